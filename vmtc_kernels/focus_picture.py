"""The picture of `vmtc focus`: what a text token focuses on, and what CMAI inhibits for it.

Needs the extra ``demo``; nothing of the core imports it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from skimage import color

from . import sheet as paper
from .llava import Focus
from .sheet import ACCENT, GREY, INK, MARGIN, TEXT, WIDTH, axes_at, by, fitted, text_width, write

# three large panels, the colour bar right of the second, and a row of small ones
_LARGE, _TOP = 552, 232
_LEFT = (MARGIN, MARGIN + _LARGE + 44, WIDTH - MARGIN - _LARGE)
_BAR, _BAR_GAP = 24, 14
_SMALL, _COUNT = 288, 6
_STRIP, _CHIP, _CHIP_GAP, _PAD = 930, 50, 10, 14
_COLOURS = colormaps["viridis"]
_PALE = "#e9edf1"
_TOP_PERCENT = 99


def draw(focus: Focus, chosen: int, out: Path, credit: str = "") -> None:
    """Write the picture as a PNG 2000 pixels wide; ``chosen`` is an index of the words."""
    paper.save(sheet(focus, chosen, credit), out)


def sheet(focus: Focus, chosen: int, credit: str = "") -> Figure:
    """The picture: photograph, scores and what stays above; the text and other tokens below."""
    lines, marked = _strip([fitted(label(word), 320) for word in focus.words], chosen)
    row = _STRIP + len(lines) * (_CHIP + _CHIP_GAP) + 62
    caption = row + _SMALL + 100
    figure = paper.blank(caption + 124)

    tokens, inhibited = focus.grid**2, int(focus.inhibited[chosen].sum())
    word = label(focus.words[chosen])
    title = f"{inhibited} of {tokens} image tokens inhibited for '{fitted(word, 500, 52)}'"
    write(figure, MARGIN, 88, title, 52, weight="bold")
    write(figure, MARGIN, 138, summary(focus), 29, color=GREY)

    patches = f"{by(focus.grid)} patches of {by(len(focus.photo) // focus.grid)} pixels"
    axes = _panel(figure, 0, "Photograph", f"{tokens} tokens", patches)
    paper.show(axes, focus.photo, focus.grid)
    paper.ruled(axes, focus.grid)

    scores = focus.scores[chosen]
    spread = f"{scores.min():.2g} to {scores.max():.2g}, sum {scores.sum():.2g}"
    axes = _panel(figure, 1, "Focus scores", f"of '{fitted(word, 240, 27)}'", spread)
    _heat(axes, focus, chosen)
    _bar(figure, *_limits(scores))

    below = f"grey: the {inhibited} that the token does not see"
    axes = _panel(figure, 2, "Kept", f"{tokens - inhibited} tokens", below)
    paper.fade(axes, focus.photo, ~focus.inhibited[chosen].reshape(focus.grid, focus.grid))

    write(figure, MARGIN, _STRIP - 30, "The text after the image", 38, weight="bold")
    for number, line in enumerate(lines):
        _chips(figure, _STRIP + number * (_CHIP + _CHIP_GAP), line, marked)
        marked -= len(line)
    for column, index in enumerate(neighbours(focus.words, chosen)):
        _small(figure, focus, column, row, index, chosen)
    for number, text in enumerate(_caption(focus, credit)):
        write(figure, MARGIN, caption + 38 * number, text, TEXT, color=GREY)
    return figure


def summary(focus: Focus) -> str:
    """Which layer and rule, in a line."""
    config = focus.config
    if config.threshold is None:
        rule = f"the {config.keep_ratio:.0%} of image tokens that it focuses on most"
    else:
        rule = f"image tokens of at least {config.threshold:.0%} of its highest focus score"
    keeps = (
        "keeps" if config.applies(focus.layer, focus.layers) else "does not inhibit but would keep"
    )
    return (
        f"In layer {focus.layer} of {focus.layers} (counted from 0), a text token {keeps} {rule}."
    )


def _caption(focus: Focus, credit: str) -> list[str]:
    return [
        "Focus score: attention of the text token to the text up to it, times the attention of that"
        " text to the image; mean over heads.",
        "Scores of a pass that inhibits nothing. Which layer to ask is an open choice. Colours end"
        f" at the {_TOP_PERCENT}th percentile; each small map has its own.",
        f"Model: {fitted(label(focus.model), 900)}. {credit}",
    ]


def _panel(figure: Figure, column: int, title: str, right: str, below: str) -> Axes:
    """Axes with a title, what it is of to the right of that, and a line below."""
    left = _LEFT[column]
    write(figure, left, _TOP - 14, title, 31, weight="bold")
    write(figure, left + _LARGE, _TOP - 14, right, 27, color=GREY, ha="right")
    write(figure, left, _TOP + _LARGE + 36, below, TEXT, color=GREY)
    return axes_at(figure, left, _TOP, _LARGE, _LARGE)


def _limits(scores: np.ndarray) -> tuple[float, float]:
    """Between which scores colours change; one token of very high score does not darken all."""
    low, high = float(scores.min()), float(np.percentile(scores, _TOP_PERCENT))
    return low, max(high, low + 1e-9)


def _heat(axes: Axes, focus: Focus, index: int) -> None:
    """Scores as colours, on which the photograph leaves its light and shade only."""
    scores = focus.scores[index]
    norm = Normalize(*_limits(scores), clip=True)
    colours = _COLOURS(norm(scores.reshape(focus.grid, focus.grid)))[..., :3]
    grey = color.rgb2gray(focus.photo)
    # around zero, so that patches keep the colour of the bar
    shade = 0.45 * (grey - grey.mean())
    painted = np.clip(paper.enlarged(colours, len(grey)) + shade[..., None], 0, 1)
    paper.show(axes, painted, focus.grid)


def _bar(figure: Figure, low: float, high: float) -> None:
    axes = axes_at(figure, _LEFT[1] + _LARGE + _BAR_GAP, _TOP, _BAR, _LARGE)
    axes.set_axis_on()
    candidates = np.array(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    ticks = candidates[(candidates >= low) & (candidates <= high)].tolist()
    mappable = ScalarMappable(Normalize(low, high), _COLOURS)
    bar = figure.colorbar(mappable, cax=axes, extend="max", extendfrac=0.04)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=23 * 72 / paper.DPI, labelcolor=GREY, color=GREY, length=2, pad=2)


def _small(figure: Figure, focus: Focus, column: int, top: float, index: int, chosen: int) -> None:
    """The map of one text token, its word above and the sum of its scores below."""
    left = MARGIN + column * (_SMALL + (WIDTH - 2 * MARGIN - _COUNT * _SMALL) / (_COUNT - 1))
    emphasis = ACCENT if index == chosen else INK
    word = fitted(label(focus.words[index]), _SMALL, 27)
    write(figure, left, top - 12, word, 27, weight="bold", color=emphasis)
    _heat(axes_at(figure, left, top, _SMALL, _SMALL), focus, index)
    total = f"sum {focus.scores[index].sum():.2g}"
    write(figure, left, top + _SMALL + 34, total, TEXT, color=GREY)


def neighbours(words: list[str], chosen: int) -> list[int]:
    """Up to six tokens to show beside one another: the chosen and the nearest that are words."""
    others = [i for i, word in enumerate(words) if i != chosen and any(map(str.isalnum, word))]
    nearest = sorted(others, key=lambda i: (abs(i - chosen), i))[: _COUNT - 1]
    return sorted([chosen, *nearest])


def _strip(chips: list[str], chosen: int) -> tuple[list[list[str]], int]:
    """Chips in at most two lines, and which of them is the chosen; of too many, those around it."""
    first, end = chosen, chosen + 1
    lines = _lines(_cut(chips, first, end))
    while (first, end) != (0, len(chips)):
        wider = max(first - 1, 0), min(end + 1, len(chips))
        wrapped = _lines(_cut(chips, *wider))
        if len(wrapped) > 2:
            break
        (first, end), lines = wider, wrapped
    return lines, chosen - first + (first > 0)


def _cut(chips: list[str], first: int, end: int) -> list[str]:
    return ["…"] * (first > 0) + chips[first:end] + ["…"] * (end < len(chips))


def _lines(chips: list[str]) -> list[list[str]]:
    """Broken where the sheet ends."""
    lines: list[list[str]] = [[]]
    x = 0.0
    for text in chips:
        width = _chip_width(text)
        if lines[-1] and x + width > WIDTH - 2 * MARGIN:
            lines.append([])
            x = 0.0
        lines[-1].append(text)
        x += width + _CHIP_GAP
    return lines


def _chips(figure: Figure, top: float, line: list[str], marked: int) -> None:
    """A line of tokens; one is marked, if its index is in the line."""
    x, height = float(MARGIN), figure.get_figheight() * paper.DPI
    for index, text in enumerate(line):
        width = _chip_width(text)
        colour, back, weight = (INK, _PALE, "normal")
        if index == marked:
            colour, back, weight = ("white", ACCENT, "bold")
        box = FancyBboxPatch(
            (x / WIDTH, 1 - (top + _CHIP) / height),
            width / WIDTH,
            _CHIP / height,
            boxstyle="round,pad=0,rounding_size=0.004",
            mutation_aspect=WIDTH / height,
            facecolor=back,
            linewidth=0,
            transform=figure.transFigure,
        )
        figure.add_artist(box)
        centre = x + width / 2
        write(figure, centre, top + 34, text, TEXT, color=colour, weight=weight, ha="center")
        x += width + _CHIP_GAP


def _chip_width(text: str) -> float:
    return 2 * _PAD + text_width(text, TEXT)


def label(word: str) -> str:
    """A token in letters that can be seen and that the font has."""
    text = word.strip() or word.replace("\n", "↵").replace(" ", "␣") or "∅"
    return "".join(c if c.isprintable() and ord(c) in _glyphs() else "□" for c in text)


@cache
def _glyphs() -> frozenset[int]:
    """The characters of both weights of the font."""
    fonts = (FontProperties(weight=weight) for weight in ("normal", "bold"))
    return frozenset.intersection(
        *(frozenset(FT2Font(findfont(font)).get_charmap()) for font in fonts)
    )
