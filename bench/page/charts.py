"""Charts of a run as matplotlib figures; nothing global is touched.

All are as wide as a phone's screen, and name their lines beside them rather than in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..record import Run
from .canvas import (
    LINE,
    NOTE,
    TITLE,
    WIDTH,
    apart,
    canvas,
    cut,
    fold,
    log_axis,
    look,
    name_lines,
    names_height,
    names_width,
    point,
    wide,
)
from .facts import (
    UNMODIFIED,
    Result,
    Row,
    best,
    best_by_our_rule,
    common,
    disturbed,
    label,
    ours,
    per,
    ratio,
    speedup,
    split,
)
from .style import INK, MUTED, OURS, RULE, SLOW, Style, Styles, styles
from .words import measured, number, pairs, times

SLOT = 33  # pixels of a provider's line


@look
def usual(result: Result, title: str, styles: Styles) -> Figure:
    """Every provider of a set-up: the median as a point, p20 to p80 as a bar, fastest first."""
    timed = sorted((r for r in result["rows"] if r["ms"]), key=lambda row: row["ms"]["median"])
    absent = _absent(result["rows"])
    notes = [f"{per([result])}, median, bar p20 to p80; right: against ours"]
    if disturbed(result):
        notes.append(f"disturbed: others kept {result['others_busy']:.2f} processors busy")
    below = [line for text in absent for line in fold(text, WIDTH - 20, NOTE)]
    height = SLOT * max(1, len(timed)) + 4
    bottom = 22 + LINE * len(below) + 8 * bool(below)
    figure, axes = canvas(title, notes, height, left=10, right=12, bottom=bottom)
    axes.set_ylim(height, 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    if timed:
        _time_axis(axes, timed)
        mine = ours(result)
        for i, row in enumerate(timed):
            _slot(axes, SLOT * i, row, mine, styles[row["kind"], row["name"]])
    else:
        axes.set_axis_off()
        axes.text(0, height / 2, "nothing was timed", color=SLOW)
    total = figure.get_size_inches()[1] * figure.dpi
    for i, text in enumerate(below):
        y = (LINE * (len(below) - i - 1) + 4) / total
        figure.text(10 / WIDTH, y, text, fontsize=NOTE, color=MUTED, va="bottom")
    return figure


def _absent(rows: Sequence[Row]) -> list[str]:
    """Who was not timed, by what became of it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if not row["ms"]:
            found.setdefault(row["status"], []).append(row["name"])
    return [f"{status}: {'; '.join(names)}" for status, names in found.items()]


def _time_axis(axes: Axes, timed: Sequence[Row]) -> None:
    """Logarithmic where a linear one would crowd the fast ones together."""
    low = min(row["ms"]["p20"] for row in timed)
    high = max(row["ms"]["p80"] for row in timed)
    if high > 8 * low:
        pad = (high / low) ** 0.06
        log_axis(axes.xaxis, low / pad, high * pad)
    else:
        axes.set_xlim(0, high * 1.04)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _slot(axes: Axes, top: float, row: Row, mine: Row | None, style: Style) -> None:
    """Name and numbers, below them the point on its track."""
    y = top + 24
    across = axes.get_yaxis_transform()
    is_ours = mine is row
    axes.axhline(y, color=RULE, linewidth=0.8)
    if mine and mine["ms"]:
        axes.vlines(mine["ms"]["median"], y - 5, y + 5, color=OURS, linewidth=1)
    axes.plot([row["ms"]["p20"], row["ms"]["p80"]], [y, y], color=style.colour, linewidth=3.5,
              alpha=0.45, solid_capstyle="butt")  # fmt: skip
    point(axes, row["ms"]["median"], y, style, 6.5 if is_ours else 5)
    value = measured(row["ms"]["median"])
    if mine and mine["ms"] and not is_ours:
        against = times(row["ms"]["median"] / mine["ms"]["median"])
        axes.text(1, top + 14, against, transform=across, ha="right")
    name = row["name"]
    if row["scope"] not in ("", "everything"):
        name += f" ({row['scope']})"
    weight = "bold" if is_ours else "normal"
    # the axes are as wide as the chart but for its margins
    room = 0.86 * (WIDTH - 22) - wide(value, bold=is_ours) - 8
    axes.text(0, top + 14, cut(name, room, bold=is_ours), transform=across, weight=weight)
    axes.text(0.86, top + 14, value, transform=across, weight=weight, ha="right")


@look
def first_token(results: Sequence[Result], title: str, styles: Styles) -> Figure:
    """Time to the first token against the visual tokens that each variant leaves."""
    found: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for result in results:
        for row in result["rows"]:
            if row["ms"]:
                whole = row["name"] == UNMODIFIED
                size = result["params"]["of" if whole else "tokens"]
                ms, images = row["ms"], result["images"]
                place = size, ms["median"] * images, ms["p20"] * images, ms["p80"] * images
                found.setdefault((row["kind"], row["name"]), []).append(place)
    names = [name for _, name in found]
    notes = ["ms of a call, median, bar p20 to p80", pairs(common(list(results)))]
    height = max(210, names_height(names) - 16)
    figure, axes = canvas(title, notes, height, right=names_width(names))
    ticks = sorted({place[0] for places in found.values() for place in places})
    most = max((place[3] for places in found.values() for place in places), default=1)
    widest = max(ticks, default=1)
    axes.set(xlim=(0, widest * 1.04), ylim=(0, most * 1.08), xlabel="visual tokens of an image")
    axes.xaxis.set_major_locator(FixedLocator(apart(axes, ticks)))
    ends = []
    for key, places in found.items():
        style = styles[key]
        xs, middles, lows, highs = zip(*sorted(places), strict=True)
        axes.vlines(xs, lows, highs, color=style.colour, linewidth=3, alpha=0.4)
        axes.plot(xs, middles, color=style.colour, linestyle=style.dash, linewidth=style.width,
                  marker=style.marker, markersize=4.5,
                  markerfacecolor=style.colour if style.filled else "none")  # fmt: skip
        ends.append((key[1], xs[-1], middles[-1], style))
    name_lines(axes, ends)
    return figure


@look
def overview(run: Run) -> Figure:
    """Of each usual set-up how many times as long as ours every provider takes, in one chart."""
    (looks,) = styles([run.results])
    lines: list[tuple[str, Any]] = []
    for suite, (results, _, failed) in split(run).items():
        if results or failed:
            lines.append(("suite", suite))
            lines += [("key", part) for part in _key(results)]
            lines += [("absent", text) for text in _never(results)]
            shared = common([*results, *failed])
            named = [(_named(r, shared), r) for r in [*results, *failed]]
            two_lines = any(_is_long(*one) for one in named)
            lines += [("set-up", (*one, two_lines)) for one in named]
    place, height = [], 0.0
    for kind, what in lines:
        place.append(height)
        height += {"suite": 26, "key": 14, "absent": 14, "set-up": 30}[kind]
        height += LINE * (kind == "set-up" and what[2])
    notes = [
        "times as long as ours takes, by name that of the best rival; red: where ours is slower;"
        " grey: the reference, and floors, which do less"
    ]
    figure, axes = canvas("ours against everybody", notes, height + 4, left=10, right=20, bottom=24)
    axes.set_ylim(height + 4, 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    ratios = [x for kind, what in lines if kind == "set-up" for _, x in _against(what[1])]
    low, high = min([*ratios, 1]), max([*ratios, 1])
    log_axis(axes.xaxis, min(low / 1.3, 0.7), max(high * 1.3, 1.4), lambda x: f"{number(x)}x")
    axes.grid(False)
    across = axes.get_yaxis_transform()
    for y, (kind, what) in zip(place, lines, strict=True):
        if kind == "suite":
            axes.text(0, y + 22, what, transform=across, fontsize=TITLE, weight="bold")
        elif kind == "key":
            for left, row in what:
                style = looks[row["kind"], row["name"]]
                axes.plot([left / WIDTH], [y + 6], transform=across, color=style.colour,
                          marker=style.marker, markersize=4.5, linewidth=0,
                          markerfacecolor=style.colour if style.filled else "none")  # fmt: skip
                axes.text((left + 7) / WIDTH, y + 10, row["name"], transform=across, fontsize=NOTE)
        elif kind == "absent":
            axes.text(0, y + 10, what, transform=across, fontsize=NOTE, color=MUTED)
        else:
            name, result, two_lines = what
            # the set-up and what came of it have a line each
            axes.text(0, y + 13, name, transform=across, fontsize=NOTE)
            _set_up(axes, y + LINE * two_lines, result, looks)
    return figure


def _key(results: Sequence[Result]) -> list[list[tuple[float, Row]]]:
    """Lines of (pixels from the left, provider) of all that a set-up has a point of."""
    rows = {(row["kind"], row["name"]): row for r in results for row, _ in _against(r)}
    lines: list[list[tuple[float, Row]]] = []
    left = math.inf
    for row in rows.values():
        takes = 20 + wide(row["name"], NOTE)
        if left + takes > WIDTH - 30:
            lines.append([])
            left = 5
        lines[-1].append((left, row))
        left += takes
    return lines


def _never(results: Sequence[Result]) -> list[str]:
    """Lines of who was timed in no set-up."""
    rows = [row for result in results for row in result["rows"]]
    timed = {row["name"] for row in rows if row["ms"]}
    names = dict.fromkeys(row["name"] for row in rows if row["name"] not in timed)
    return fold(f"not timed: {'; '.join(names)}", WIDTH - 30, NOTE) if names else []


def _against(result: Result) -> list[tuple[Row, float]]:
    mine = ours(result) if "rows" in result else None
    if not mine or not mine["ms"]:
        return []
    others = [row for row in result["rows"] if row["ms"] and row is not mine]
    return [(row, ratio(mine, row).median) for row in others]


def _named(result: Result, shared: dict[str, Any]) -> str:
    return label(result, shared) + (" (disturbed)" if disturbed(result) else "")


def _outcome(result: Result) -> tuple[str, bool]:
    """Of a set-up in a few words, and whether ours lost."""
    if "error" in result:
        return "failed as a whole", True
    won, rival = speedup(result), best(result)
    if won and rival:
        own = " (own rule)" if rival is not best_by_our_rule(result) else ""
        return f"{times(won.median)} {rival['name']}{own}", won.median < 1
    return ("no rival was timed", False) if _against(result) else ("ours was not timed", True)


def _is_long(name: str, result: Result) -> bool:
    """Whether a set-up and what came of it do not fit into one line."""
    return wide(name, NOTE) + wide(_outcome(result)[0], NOTE, bold=True) > WIDTH - 40


def _set_up(axes: Axes, y: float, result: Result, looks: Styles) -> None:
    across = axes.get_yaxis_transform()
    text, lost = _outcome(result)
    axes.text(1, y + 13, text, transform=across, fontsize=NOTE, ha="right", weight="bold",
              color=SLOW if lost else INK)  # fmt: skip
    axes.axhline(y + 22, color=RULE, linewidth=0.8)
    axes.fill_between([axes.get_xlim()[0], 1], y + 17, y + 27, color=SLOW, alpha=0.15, linewidth=0)
    axes.vlines(1, y + 16, y + 28, color=OURS, linewidth=1.6)
    for row, x in _against(result):
        point(axes, x, y + 22, looks[row["kind"], row["name"]], 5)
