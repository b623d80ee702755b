"""The frame of a chart: its size, its titles, its axes, and names beside lines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .style import INK, MUTED, RULE, Style
from .words import number

# pixels of a phone's screen, so that nothing is made smaller there
WIDTH, DPI = 380, 96
# of a name beside a line: its longest width, its height, and what lies between it and the axes
NAME, LINE, GAP = 104, 12.5, 26
# letters of titles, of notes and of all the rest, in points
TITLE, NOTE, TEXT = 10.0, 8.0, 8.5
LOOK: dict[Any, Any] = {
    # a name is no formula, whatever signs it has
    "text.parse_math": False,
    "font.size": TEXT,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
# around a function that makes a figure, so that nobody else's figures look like it
look = matplotlib.rc_context(LOOK)


def canvas(
    title: str,
    notes: Sequence[str],
    height: float,
    *,
    left: float = 46,
    right: float = 12,
    bottom: float = 36,
) -> tuple[Figure, Axes]:
    """Axes of ``height`` pixels with the title and the notes above; the other sizes are margins."""
    titles = fold(title, WIDTH - 16, TITLE, bold=True)
    lines = [line for note in notes for line in fold(note, WIDTH - 16, NOTE)]
    top = 10 + 16 * len(titles) + LINE * len(lines) + 6
    total = top + height + bottom
    figure = Figure(figsize=(WIDTH / DPI, total / DPI), dpi=DPI)
    down = 8.0
    for text in titles:
        figure.text(8 / WIDTH, 1 - down / total, text, fontsize=TITLE, weight="bold", va="top")
        down += 16
    for text in lines:
        figure.text(8 / WIDTH, 1 - down / total, text, fontsize=NOTE, color=MUTED, va="top")
        down += LINE
    share = (WIDTH - left - right) / WIDTH
    axes = figure.add_axes((left / WIDTH, bottom / total, share, height / total))
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(length=0, pad=4)
    return figure, axes


@cache
def wide(text: str, size: float = TEXT, bold: bool = False) -> float:
    """Pixels that it takes in the letters of a PNG; those of a page are mostly narrower."""
    letters = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    points, _, _ = text_to_path.get_text_width_height_descent(text, letters, ismath=False)
    # on whole pixels they take a little more
    return 1.05 * points * DPI / 72


def fold(text: str, room: float, size: float = TEXT, bold: bool = False) -> list[str]:
    """Lines of at most so many pixels, of words where they fit in one."""
    lines = [""]
    # a word ends at a space or after a hyphen
    for word in re.findall(r"\s+|[^\s-]+-*|-+", text):
        fits = wide((lines[-1] + word).rstrip(), size, bold) <= room
        if fits or not lines[-1]:
            lines[-1] += word
        elif not word.isspace():
            lines.append(word)
        while wide(lines[-1].rstrip(), size, bold) > room and len(lines[-1]) > 1:
            head = cut(lines[-1], room, size, bold, end="")
            lines[-1:] = [head, lines[-1][len(head) :]]
    return [line.strip() for line in lines]


def cut(text: str, room: float, size: float = TEXT, bold: bool = False, end: str = "…") -> str:
    """As much of it as fits into so many pixels, one letter at least."""
    if wide(text, size, bold) <= room:
        return text
    while len(text) > 1 and wide(text + end, size, bold) > room:
        text = text[:-1]
    return text + end


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two positive ones, powers of ten where they lie far apart."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def byte_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of two."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = math.ceil(len(powers) / most) or 1
    return [2.0**power for power in powers if power % step == 0]


def log_axis(
    axis: Any,
    low: float,
    high: float,
    text: Callable[[float], str] = number,
    ticks_of: Callable[[float, float], list[float]] = log_ticks,
) -> None:
    """A logarithmic axis from low to high, with one tick at least."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    ticks = ticks_of(low, high)
    if axis.axis_name == "x":
        ticks = [at for at in ticks if _is_inside(axis.axes, at, text(at))]
    axis.set_major_locator(FixedLocator(ticks or [(low * high) ** 0.5]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _is_inside(axes: Axes, x: float, text: str) -> bool:
    """Whether a tick's text ends within the figure."""
    middle, half = axes.transData.transform((x, 1))[0], wide(text) / 2
    return half <= middle <= WIDTH - half


def size_axis(axes: Axes, name: str, sizes: Sequence[float]) -> None:
    """Logarithmic, with the sizes as ticks as far as there is room for their numbers."""
    low, high = min(sizes), max(sizes)
    pad = (high / low) ** 0.04 if high > low else 1.5
    axes.set(xscale="log", xlim=(low / pad, high * pad))
    axes.xaxis.set_major_locator(FixedLocator(apart(axes, sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_xlabel(name)


def apart(axes: Axes, sizes: Sequence[float]) -> list[float]:
    """Of the sizes as many as there is room for numbers below the axes, the largest first."""
    kept: list[float] = []
    place = {size: axes.transData.transform((size, 1))[0] for size in sizes}
    for size in sorted(sizes, reverse=True):
        room = 8 + (wide(number(size)) + wide(number(kept[-1]))) / 2 if kept else 0.0
        if not kept or place[kept[-1]] - place[size] > room:
            kept.append(size)
    return kept


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of blocks of such sizes that do not overlap, in the order of and as near as can be
    to those wanted; within low and high where they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        size, offset, total = sum(sizes[i] for i in group), 0.0, 0.0
        for i in group:
            total += wanted[i] - offset - sizes[i] / 2
            offset += sizes[i]
        return max(low, min(total / len(group), high - size))

    for i in order:
        groups.append([i])
        while len(groups) > 1:
            before = groups[-2]
            if start(before) + sum(sizes[j] for j in before) <= start(groups[-1]):
                break
            groups[-2:] = [before + groups[-1]]
    middles = [0.0] * len(wanted)
    for group in groups:
        at = start(group)
        for i in group:
            middles[i] = at + sizes[i] / 2
            at += sizes[i]
    return middles


def names_height(names: Sequence[str]) -> float:
    """Pixels that the names beside a chart's lines take at least."""
    return sum(_height(name) for name in names)


def _lines(name: str) -> list[str]:
    return fold(name, NAME)


def _height(name: str) -> float:
    return LINE * len(_lines(name)) + 3


def names_width(names: Sequence[str]) -> float:
    # as wide as if it were bold, as that of ours is
    longest = max((wide(line, bold=True) for n in names for line in _lines(n)), default=0.0)
    return GAP + longest + 4


def name_lines(axes: Axes, ends: Sequence[tuple[str, float, float, Style]]) -> None:
    """Write names right of the axes, each tied to its line's last point (x, y in data)."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    wide, high = figure.get_size_inches() * DPI
    box = axes.get_position()
    points = [axes.transData.transform((x, y)) for _, x, y, _ in ends]
    heights = [_height(name) for name, *_ in ends]
    # room below the axes, beside the sizes, is room as well
    middles = spread([y for _, y in points], heights, box.y0 * high - 16, box.y1 * high + 6)
    left = box.x1 * wide
    for (name, _, _, style), (x, y), middle in zip(ends, points, middles, strict=True):
        face = style.colour if style.filled else "none"
        figure.add_artist(
            Line2D(
                [x / wide, (left + 3) / wide, (left + GAP - 7) / wide],
                [y / high, y / high if x > left - 12 else middle / high, middle / high],
                color=style.colour,
                linewidth=0.7,
                alpha=0.6,
            )
        )
        figure.add_artist(
            Line2D(
                [(left + GAP - 6) / wide],
                [middle / high],
                color=style.colour,
                marker=style.marker,
                markersize=4.5,
                markerfacecolor=face,
                linewidth=0,
            )
        )
        figure.text(
            (left + GAP) / wide,
            middle / high,
            "\n".join(_lines(name)),
            va="center",
            linespacing=1.1,
            weight="bold" if style.width > 2 else "normal",
        )


def point(axes: Axes, x: float, y: float, style: Style, size: float) -> None:
    face = style.colour if style.filled else "none"
    axes.plot([x], [y], marker=style.marker, markersize=size, color=style.colour,
              markerfacecolor=face, linewidth=0, zorder=4)  # fmt: skip
