"""The picture of `vmtc explain-image`: which visual tokens of a photograph are kept and merged.

Needs the extra ``demo``; nothing of the core imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from skimage import color

from . import sheet as paper
from .explained import CUT, DROPPED, OUTSIDE, Explained, Focus
from .focus_picture import label
from .picture import palette
from .sheet import GAP, GREY, INK, MARGIN, TEXT, TIMES, WIDTH, axes_at, enlarged, write

# the key below the summary, and where panels start
_KEY, _SWATCH, _TOP = 176, 40, 296
# below a panel, between it and the next, and what a panel is at least, at most
_BELOW, _BETWEEN, _NARROW, _TALL = 78, 156, 330, 1000
# a mosaic of more cells a side has its tokens in a panel that is larger than the others
_FEW_CELLS = 16
_COLOURS = colormaps["viridis"]
_TOP_PERCENT = 99


class Counts(NamedTuple):
    """Tokens kept and merged; patches merged into these, dropped, and left out by the model."""

    kept: int
    groups: int
    merged: int
    dropped: int
    cut: int


class _Panel(NamedTuple):
    title: str
    below: tuple[str, str]
    paint: Callable[[Axes], None]


class _Box(NamedTuple):
    """Where a panel is, in pixels, and the width of its texts."""

    left: float
    top: float
    width: float
    height: float
    room: float


def draw(explained: Explained, out: Path, credit: str = "") -> None:
    """Write the picture as a PNG 2000 pixels wide."""
    paper.save(sheet(explained, credit), out)


def sheet(explained: Explained, credit: str = "") -> Figure:
    """The picture: photograph, importance, the focus of a token if there is one, and tokens."""
    panels, caption = _panels(explained), _caption(explained, credit)
    boxes = _boxes(explained, len(panels))
    bottom = max(round(box.top + box.height) for box in boxes) + _BELOW + 52
    figure = paper.blank(bottom + 38 * len(caption))

    title = f"{explained.before} image tokens become {explained.after}"
    write(figure, MARGIN, 88, title, 52, weight="bold")
    write(figure, MARGIN, 138, summary(explained), 29, color=GREY)
    _key(figure, explained)
    for panel, box in zip(panels, boxes, strict=True):
        title = paper.fitted(panel.title, box.room, 31)
        write(figure, box.left, box.top - 14, title, 31, weight="bold")
        for line, text in enumerate(panel.below):
            y = box.top + box.height + 36 + 34 * line
            write(figure, box.left, y, paper.fitted(text, box.room), TEXT, color=GREY)
        panel.paint(axes_at(figure, *box[:4]))
    for number, text in enumerate(caption):
        write(figure, MARGIN, bottom + 38 * number, text, TEXT, color=GREY)
    return figure


def summary(explained: Explained) -> str:
    """What becomes of the patches, in a line."""
    number = counts(explained)
    parts = [f"{number.kept} patches stay as they are"]
    if number.groups:
        how = f"by {explained.config.metric} distance and merged into {number.groups} tokens"
        parts.append(f"{number.merged} are clustered {how}")
    if number.dropped:
        parts.append(f"{number.dropped} are dropped")
    return f"{'; '.join(parts)}."


def facts(explained: Explained) -> list[tuple[str, str]]:
    """What the command prints."""
    number, focus = counts(explained), explained.focus
    kinds = [f"{number.kept} primary", f"{number.groups} merged"]
    kinds += [f"{explained.extra} that are no patches"] * bool(explained.extra)
    tiles = f"{explained.tiles} ({explained.where})" if explained.where else explained.tiles
    rows = [
        ("seen as", f"{tiles}, {explained.cell} x {explained.cell} pixels for a token"),
        ("image tokens", f"{explained.before} → {explained.after} ({' + '.join(kinds)})"),
        (
            "importance",
            f"{explained.source}, {spread(explained.scores[explained.slot >= DROPPED])}",
        ),
        ("layer", f"{explained.layer} of {explained.layers} of the vision encoder, from 0"),
    ]
    if number.dropped:
        rows.append(("dropped", f"{number.dropped} of the patches"))
    if number.cut:
        rows.append(("cut away", f"{number.cut} patches, which the model leaves out"))
    if focus is not None:
        rows += [
            ("text token", f"{focus.word!r}, token {focus.place} of the prompt"),
            ("inhibited", f"{focus.hidden} of {focus.tokens} image tokens"),
            ("focus scores", f"{spread(focus.scores)}, in text layer {focus.layer}"),
        ]
    return [
        *rows,
        ("model", explained.model),
        ("backend", explained.backend),
        ("time", f"{explained.seconds:.3g} s, one forward pass on {explained.device}"),
    ]


def counts(explained: Explained) -> Counts:
    slot, kept = explained.slot, int(explained.primary.sum())
    number = [int(cells.sum()) for cells in (_merged(explained), slot == DROPPED, slot == CUT)]
    return Counts(kept, len(explained.primary) - kept, *number)


def _merged(explained: Explained) -> np.ndarray:
    """bool [G, G]"""
    return (explained.slot >= 0) & ~explained.primary[explained.slot.clip(0)]


def _boxes(explained: Explained, panels: int) -> list[_Box]:
    """Side by side; the tokens, which come last, large at the left where there are many cells."""
    rows, columns = explained.shape
    whole, gap, ratio = WIDTH - 2 * MARGIN, GAP + 12, rows / columns
    # as high as the others one below the other
    small = (whole - gap - (panels - 2) * _BETWEEN / ratio) / panels
    large, side_by_side = whole - gap - small, panels
    if max(rows, columns) > _FEW_CELLS and ratio <= 1.3:
        if small >= _NARROW:
            left, down = MARGIN + large + gap, small * ratio + _BETWEEN
            boxes = [
                _Box(left, _TOP + number * down, small, small * ratio, small)
                for number in range(panels - 1)
            ]
            return [*boxes, _Box(MARGIN, _TOP, large, large * ratio, large)]
        side_by_side = 2
    room = (whole + GAP) / side_by_side - GAP
    width = min(room, _TALL / ratio)
    return [
        _Box(
            MARGIN + number % side_by_side * (room + GAP),
            _TOP + number // side_by_side * (width * ratio + _BETWEEN),
            width,
            width * ratio,
            room,
        )
        for number in range(panels)
    ]


def _key(figure: Figure, explained: Explained) -> None:
    """What patches look like that were kept, merged, dropped, or not read on: one of each."""
    left = float(MARGIN)
    for cells, name in (
        ((explained.slot >= 0) & ~_merged(explained), "kept as it is"),
        (_merged(explained), "merged: the mean colour of a group, in an outline of its own"),
        (explained.slot == DROPPED, "dropped"),
        (explained.slot == CUT, "cut away by the model"),
    ):
        if not cells.any():
            continue
        scores = np.where(cells, explained.scores, -np.inf)
        row, column = np.unravel_index(np.argmax(scores), cells.shape)
        side = len(explained.photo) // len(cells)
        part = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        slot = explained.slot[row : row + 1, column : column + 1]
        one = replace(explained, photo=explained.photo[part], slot=slot, shape=(1, 1))
        _tokens(axes_at(figure, left, _KEY, _SWATCH, _SWATCH), one)
        write(figure, left + _SWATCH + 12, _KEY + 29, name, TEXT, color=GREY)
        left += _SWATCH + paper.text_width(name, TEXT) + 60


def _panels(explained: Explained) -> list[_Panel]:
    """That of the tokens is the last."""
    panels = [
        _Panel(
            "Photograph",
            (explained.tiles, "as the model sees it"),
            lambda axes: _photograph(axes, explained),
        ),
        _Panel(
            "Importance",
            (explained.source, f"vision layer {explained.layer} of {explained.layers}"),
            lambda axes: _heat(axes, explained, explained.scores, explained.slot >= DROPPED),
        ),
    ]
    if (focus := explained.focus) is not None:
        below = (
            f"grey: {focus.hidden} inhibited",
            f"text layer {focus.layer} of {focus.layers}",
        )
        title = f"Focus of '{paper.fitted(label(focus.word), 230, 31)}'"
        panels.append(_Panel(title, below, lambda axes: _focus(axes, explained, focus)))
    number = counts(explained)
    extra = f"and {explained.extra} that are no patches" if explained.extra else ""
    below = f"{number.kept} kept, {number.groups} merged", extra
    return [*panels, _Panel("Kept and merged", below, lambda axes: _tokens(axes, explained))]


def _caption(explained: Explained, credit: str) -> list[str]:
    scores, focus = explained.scores[explained.slot >= DROPPED], explained.focus
    ranges = f"importance {spread(scores)}" + (f", focus {spread(focus.scores)}" if focus else "")
    side = f"{explained.cell} {TIMES} {explained.cell}"
    lines = [
        f"Pixels as the model gets them, {side} for a token. Layers are counted from 0.",
        f"Colours run up to the {_TOP_PERCENT}th percentile, the yellow one: {ranges}.",
    ]
    if explained.where:
        where = f"Tiles: {explained.where}"
        lines.append(f"{where}. Each is compressed for itself; colours of outlines repeat.")
    if explained.extra:
        lines.append(f"{explained.extra} tokens are no patches but newlines or [CLS], and stay.")
    if focus is not None:
        lines.append(
            "Focus: attention of the text token to the text up to it, times the attention of that"
            " text to the image; mean over heads."
        )
    lines.append(f"Prompt: '{paper.fitted(label(explained.prompt), 1600)}'.")
    lines.append(f"Model: {paper.fitted(label(explained.model), 800)}. {credit}")
    return lines


def spread(values: np.ndarray) -> str:
    return f"{values.min():.2g} to {values.max():.2g}"


def _show(axes: Axes, explained: Explained, photo: np.ndarray) -> None:
    """The part of the mosaic that tiles take up."""
    paper.show(axes, photo, len(explained.slot))
    rows, columns = explained.shape
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def _photograph(axes: Axes, explained: Explained) -> None:
    paper.ruled(axes, len(explained.slot))
    _show(axes, explained, explained.photo)


def _heat(axes: Axes, explained: Explained, values: np.ndarray, shown: np.ndarray) -> None:
    """Values [G, G] as colours where ``shown``, on which the photograph leaves light and shade."""
    photo = explained.photo
    known = values[shown] if shown.any() else np.zeros(1)
    low, high = float(known.min()), float(np.percentile(known, _TOP_PERCENT))
    norm = Normalize(low, max(high, low + 1e-9), clip=True)
    colours = _COLOURS(norm(np.where(shown, values, low)))[..., :3]
    grey = color.rgb2gray(photo)
    shade = 0.45 * (grey - grey[enlarged(explained.slot != OUTSIDE, len(photo))].mean())
    painted = 255 * np.clip(enlarged(colours, len(photo)) + shade[..., None], 0, 1)
    _show(axes, explained, _hatched(explained, paper.where(shown, painted, _faded(photo))))


def _focus(axes: Axes, explained: Explained, focus: Focus) -> None:
    """The score of each token over all of its patches; those of inhibited ones are grey."""
    slot = explained.slot
    seen = (slot >= 0) & ~focus.inhibited[slot.clip(0)]
    _heat(axes, explained, focus.scores[slot.clip(0)], seen)
    paper.borders(axes, seen, INK, 0.7)


def _tokens(axes: Axes, explained: Explained) -> None:
    """Kept patches as they are; groups in their mean colour, each in an outline of its own."""
    slot, photo, merged = explained.slot, explained.photo, _merged(explained)
    side, cell = len(photo), len(photo) // len(slot)
    painted = paper.where(merged, _means(photo, slot), photo)
    painted = paper.where(slot == DROPPED, _faded(photo), painted)
    # so that a kept patch is not taken for a part of a group that looks like it
    kept = (slot >= 0) & ~merged
    thin = _edges(np.where(kept, slot, -1), side, 1) & enlarged(kept, side)
    painted = np.where(thin[..., None], 0.6 * painted + 0.4 * 255, painted)
    number = np.where(merged, explained.group[slot.clip(0)], 0)
    colours = palette(max(int(explained.group.max()), 0) + 1)
    edges = _edges(np.where(merged, slot, -1), side, -(-cell // 10)) & enlarged(merged, side)
    painted = np.where(edges[..., None], enlarged(colours[number], side), painted)
    _show(axes, explained, _hatched(explained, painted.astype(np.uint8)))


def _means(photo: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """The mean colour of a slot in all of its cells."""
    side, grid = len(photo) // len(slot), len(slot)
    cells = photo.reshape(grid, side, grid, side, 3).mean((1, 3))
    index = slot.clip(0).ravel()
    sizes = np.bincount(index)
    means = np.stack(
        [np.bincount(index, cells[..., channel].ravel()) / sizes.clip(1) for channel in range(3)],
        axis=-1,
    )
    return enlarged(means[index].reshape(cells.shape), len(photo))


def _edges(labels: np.ndarray, side: int, near: int) -> np.ndarray:
    """bool ``[side, side]``: pixels within ``near`` of a cell with another label [G, G]."""
    pixels = enlarged(labels, side)
    padded = np.pad(pixels, near, constant_values=OUTSIDE)
    steps = (0, near, 2 * near)
    around = [padded[y : y + side, x : x + side] for y in steps for x in steps]
    return np.any([pixels != other for other in around], axis=0)


def _faded(photo: np.ndarray) -> np.ndarray:
    """As `sheet.fade` does it."""
    return 255 - (255 - color.rgb2gray(photo)[..., None] * 255) * 0.22


def _hatched(explained: Explained, photo: np.ndarray) -> np.ndarray:
    """What the model cut away is faded under stripes."""
    y, x = np.indices(photo.shape[:2])
    width = max(len(photo) // len(explained.slot) // 6, 2)
    striped = np.where(((x + y) // width % 3 == 0)[..., None], 150, _faded(explained.photo))
    return paper.where(explained.slot == CUT, striped, photo)
