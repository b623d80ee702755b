"""The pixels that a vision-language model sees, in cells of one visual token each.

A model that cuts a photograph into tiles sees it twice, whole and in pieces: a mosaic shows all.
"""

from __future__ import annotations

import importlib
import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .sheet import TIMES

# pixels of a mosaic's side, about, and the fewest and most of a cell's
_SIDE, _CELL = 1200, (6, 64)


class Mosaic(NamedTuple):
    """A square of G x G cells, of which those beside the tiles are white.

    ``photo``: uint8 ``[S, S, 3]``; ``rows``: i64 ``[G, G]``, the row that the projector has for a
    cell, -1 beside the tiles; ``shape``: rows and columns that tiles take up, one of them G;
    ``cell``: the model's pixels on a side of one; ``tiles``, ``where``: what they are, and which is
    where if there are several.
    """

    photo: np.ndarray
    rows: np.ndarray
    shape: tuple[int, int]
    cell: int
    tiles: str
    where: str


class _Tile(NamedTuple):
    """pixels: uint8 ``[h * side, w * side, 3]``; rows: i64 ``[h, w]``, the projector's."""

    pixels: np.ndarray
    rows: np.ndarray


def make_mosaic(inputs: Any, layout: Any, family: Any, processor: Any) -> Mosaic:
    """The one image among a processor's outputs ``inputs``, as the model gets it.

    layout, family: the `Layout` of that image, and the model's `Family`.
    """
    tiles = _tiles(inputs, layout, family, processor.image_processor)
    height, width = tiles[0].rows.shape
    grid = f"{height} {TIMES} {width}"
    if len(tiles) == 1:
        return _put(tiles, [(0, 0)], f"{grid} tokens")
    rows, columns, first = _cut(inputs, family, processor, len(tiles) - 1)
    # whichever comes nearer to a square
    beside = columns <= rows
    down, right = (0, width + 1) if beside else (height + 1, 0)
    places = [
        (down + row * (height + 1), right + column * (width + 1))
        for row in range(rows)
        for column in range(columns)
    ]
    places.insert(0 if first else len(places), (0, 0))
    here, there = ("left", "right") if beside else ("top", "below")
    where = f"{here}: all of it, {there}: {rows} {TIMES} {columns} pieces"
    return _put(tiles, places, f"{len(tiles)} tiles of {grid}", where)


def _tiles(inputs: Any, layout: Any, family: Any, images: Any) -> list[_Tile]:
    """In the order in which the model reads them, with the normalisation undone."""
    pixels = inputs["pixel_values"].float().cpu()
    patch = family.model.config.vision_config.patch_size
    merge = math.isqrt(family.patches)
    if "image_grid_thw" in inputs:
        height, width = (int(side) // merge for side in inputs["image_grid_thw"][0, 1:])
        # of each token the patches, of each of these channels, frames of a still, pixels
        pixels = pixels.view(height, width, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        pixels = pixels.permute(0, 2, 5, 1, 3, 6, 4).flatten(3, 5).flatten(0, 2)[None]
        rows = layout.rows.view(1, height, width)
    else:
        pixels = pixels.flatten(0, -4).permute(0, 2, 3, 1)
        rows = torch.arange(layout.size).view(len(pixels), -1)
        side = math.isqrt(rows.shape[1])
        # [CLS] comes first, if it is passed on
        rows = rows[:, -(side**2) :].unflatten(1, (side, side))
        # what fills no patch is not seen
        seen = side * merge * patch
        pixels = pixels[:, :seen, :seen]
    if images.do_normalize:
        pixels = pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)
    if images.do_rescale:
        pixels = pixels / images.rescale_factor
    tiles = zip(pixels.round().clamp(0, 255).byte(), rows, strict=True)
    return [_Tile(*map(Tensor.numpy, tile)) for tile in tiles]


def _cut(inputs: Any, family: Any, processor: Any, pieces: int) -> tuple[int, int, bool]:
    """Rows and columns of the pieces, and whether the whole photograph comes before them."""
    if "image_sizes" in inputs:
        module = importlib.import_module(type(family.core).__module__)
        config = family.model.config
        rows, columns = module.get_anyres_image_grid_shape(
            inputs["image_sizes"][0].tolist(),
            config.image_grid_pinpoints,
            config.vision_config.image_size,
        )
        return rows, columns, True
    # the prompt names them, before any text of the user's
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    row, column = re.findall(r"<row_(\d+)_col_(\d+)>", text)[pieces - 1]
    return int(row), int(column), False


def _put(tiles: list[_Tile], places: list[tuple[int, int]], names: str, where: str = "") -> Mosaic:
    """Tiles of one size with their upper left corners at cells ``places``."""
    height, width = tiles[0].rows.shape
    shape = max(y for y, _ in places) + height, max(x for _, x in places) + width
    side = max(shape)
    cell = min(max(_SIDE // side, _CELL[0]), _CELL[1])
    photo = np.full((side * cell, side * cell, 3), 255, np.uint8)
    rows = np.full((side, side), -1)
    for tile, (y, x) in zip(tiles, places, strict=True):
        image = Image.fromarray(tile.pixels)
        image = image.resize((width * cell, height * cell), Image.Resampling.BICUBIC)
        here = slice(y * cell, (y + height) * cell), slice(x * cell, (x + width) * cell)
        photo[here] = np.asarray(image)
        rows[y : y + height, x : x + width] = tile.rows
    return Mosaic(photo, rows, shape, len(tiles[0].pixels) // height, names, where)
