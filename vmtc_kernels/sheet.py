"""What the pictures share: a sheet in pixels, its texts, colours, and marks on patches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from skimage import color

from .patches import InputError

# in pixels of the written PNG
WIDTH, DPI = 2000, 200
MARGIN, GAP = 56, 32
# size of captions
TEXT = 25
INK, GREY, ACCENT = "#1b1f24", "#5f6b7a", "#0a7a55"
TIMES = "\N{MULTIPLICATION SIGN}"


def blank(height: int) -> Figure:
    """A white sheet of `WIDTH` x ``height`` pixels."""
    return Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")


def save(figure: Figure, out: Path) -> None:
    """Write the sheet as a PNG."""
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def write(figure: Figure, x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Text whose baseline starts at pixel (x, y) from the upper left corner."""
    style.setdefault("color", INK)
    # a dollar sign is no formula
    style["parse_math"] = False
    height = figure.get_figheight() * DPI
    figure.text(x / WIDTH, 1 - y / height, text, fontsize=size * 72 / DPI, **style)


@cache
def text_width(text: str, size: float) -> float:
    """Pixels of a bold text, the wider: to mark a chip does not move the others."""
    font = FontProperties(size=size, weight="bold")
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def fitted(text: str, pixels: float, size: float = TEXT) -> str:
    """As much of the text as fits when it is bold."""
    if text_width(text, size) <= pixels:
        return text
    while text and text_width(text + "…", size) > pixels:
        text = text[:-1]
    return text + "…"


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without ticks whose upper left corner is at pixel (left, top)."""
    total = figure.get_figheight() * DPI
    axes = figure.add_axes(
        (left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total)
    )
    axes.set_axis_off()
    return axes


def by(side: int) -> str:
    return f"{side} {TIMES} {side}"


def show(axes: Axes, image: np.ndarray, grid: int) -> None:
    """The photograph in units of patches."""
    axes.imshow(image, extent=(0, grid, grid, 0), interpolation="bicubic")


def ruled(axes: Axes, grid: int) -> None:
    """Thin lines between all patches."""
    lines = range(1, grid)
    axes.vlines(lines, 0, grid, color="white", alpha=0.35, linewidth=0.35)
    axes.hlines(lines, 0, grid, color="white", alpha=0.35, linewidth=0.35)


def fade(axes: Axes, photo: np.ndarray, kept: np.ndarray) -> None:
    """A photograph ``[S, S, 3]`` whose patches are grey and faded where not ``kept`` [g, g]."""
    faded = 255 - (255 - color.rgb2gray(photo)[..., None] * 255) * 0.22
    show(axes, where(kept, photo, faded), len(kept))
    borders(axes, kept, INK, 0.7)


def enlarged(values: np.ndarray, side: int) -> np.ndarray:
    """Each value of a grid [g, g] over the pixels of its patch: ``[side, side]``."""
    patch = side // len(values)
    return values.repeat(patch, axis=0).repeat(patch, axis=1)


def where(kept: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Pixels of ``inside`` in the patches where ``kept``, of ``outside`` elsewhere."""
    mask = enlarged(kept, len(inside))
    return np.where(mask[..., None], inside, outside).astype(np.uint8)


def borders(axes: Axes, labels: np.ndarray, colour: str, width: float) -> None:
    """A line between every two neighbouring patches of different label."""
    rows, columns = np.nonzero(labels[1:] != labels[:-1])
    lines = [((c, r + 1), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(labels[:, 1:] != labels[:, :-1])
    lines += [((c + 1, r), (c + 1, r + 1)) for r, c in zip(rows, columns, strict=True)]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width))
