"""Sequences of text, images and padding for the tests of focus attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cases import array, normal, place
from torch import Tensor

PADDING, TEXT, IMAGE = 0, 1, 2
# shares of a sequence, in order
LAYOUTS: dict[str, list[tuple[float, int]]] = {
    "text, image, text": [(0.2, TEXT), (0.5, IMAGE), (0.3, TEXT)],
    "two images": [(0.1, TEXT), (0.3, IMAGE), (0.2, TEXT), (0.2, IMAGE), (0.2, TEXT)],
    "left padding": [(0.25, PADDING), (0.15, TEXT), (0.3, IMAGE), (0.3, TEXT)],
    "right padding": [(0.1, IMAGE), (0.3, TEXT), (0.2, IMAGE), (0.1, TEXT), (0.3, PADDING)],
    "no image": [(1.0, TEXT)],
    "image last": [(0.4, TEXT), (0.6, IMAGE)],
    "padding within": [(0.2, TEXT), (0.1, PADDING), (0.4, IMAGE), (0.1, 7), (0.2, TEXT)],
    "nothing": [(1.0, PADDING)],
}


def sequence(name: str, length: int) -> Tensor:
    """uint8 [length]."""
    parts = LAYOUTS[name]
    ends = np.round(np.cumsum([share for share, _ in parts]) * length).astype(int)
    out = torch.zeros(length, dtype=torch.uint8, device="cpu")
    begin = 0
    for end, (_, kind) in zip(ends, parts, strict=True):
        out[begin:end] = kind
        begin = end
    return out


def sequences(batch: int, length: int, first: int = 0) -> Tensor:
    """uint8 [batch, length], row by row another layout."""
    names = list(LAYOUTS)
    rows = [sequence(names[(first + b) % len(names)], length) for b in range(batch)]
    return place(torch.stack(rows) if rows else torch.zeros(0, length, dtype=torch.uint8))


def attention_inputs(
    batch: int,
    heads: int,
    groups: int,
    length: int,
    d: int,
    *,
    queries: int | None = None,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    first: int = 0,
) -> dict[str, Tensor]:
    """q, k, v and modality; queries is Lq, length unless given."""
    return {
        "q": normal(batch, heads, queries or length, d, dtype=dtype, seed=seed),
        "k": normal(batch, groups, length, d, dtype=dtype, seed=seed + 1),
        "v": normal(batch, groups, length, dv or d, dtype=dtype, seed=seed + 2),
        "modality": sequences(batch, length, first),
    }


def random_bits(batch: int, heads: int, queries: int, words: int, seed: int = 0) -> Tensor:
    """int32 [batch, heads, queries, words], each bit set or not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, queries, words)
    low, high = -(2**31), 2**31
    bits = torch.randint(low, high, shape, generator=generator, device="cpu")
    return place(bits.to(torch.int32))


def unpacked(mask: Tensor, count: int) -> np.ndarray:
    """bool [..., count] of packed bits [..., words]; beyond the words nothing is set."""
    words = array(mask).astype(np.int64) & 0xFFFFFFFF
    bits = (words[..., None] >> np.arange(32)) & 1
    flat = bits.reshape(*words.shape[:-1], -1).astype(bool)[..., :count]
    more = count - flat.shape[-1]
    return np.concatenate([flat, np.zeros((*flat.shape[:-1], more), bool)], -1)


def positions_of(given: dict[str, Any], queries: int) -> np.ndarray:
    """[B, Lq]: as given, or the last of the sequence."""
    if given.get("query_positions") is not None:
        return array(given["query_positions"])
    batch, length = given["modality"].shape
    return np.tile(np.arange(length - queries, length), (batch, 1))
