"""Charts of a sweep: time, memory and speed-up against a size."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from .canvas import (
    NOTE,
    byte_ticks,
    canvas,
    log_axis,
    log_ticks,
    look,
    name_lines,
    names_height,
    names_width,
    size_axis,
)
from .facts import Ratio, Rival, Sweep, best, best_by_our_rule, best_rivals, disturbed, speedup
from .style import INK, MUTED, OURS, SLOW, Styles
from .words import listed, memory, number, pairs

# a series: whose it is, and (size, middle, low, high) of each size that has one
Series = tuple[tuple[str, str], list[tuple[float, float, float, float]]]


@look
def time(sweep: Sweep, suite: str, styles: Styles) -> Figure:
    """Time against size of every provider, both logarithmic, p20 to p80 as a band."""
    series: list[Series] = []
    for key, rows in sweep.rows().items():
        points = [
            (size, *(row["ms"][of] * sweep.scale(result) for of in ("median", "p20", "p80")))
            for size, result, row in rows
            if row["ms"]
        ]
        series.append((key, points))
    what = f"{sweep.unit}: median, band p20 to p80"
    return _lines(sweep, f"{suite}: time over {sweep.axis}", what, series, styles, number)


@look
def peak(sweep: Sweep, suite: str, styles: Styles) -> Figure:
    """Peak memory of a call against size; who holds nothing that torch sees has no line."""
    series: list[Series] = []
    for key, rows in sweep.rows().items():
        held = [(size, row.get("peak_bytes")) for size, _, row in rows if row["status"] == "ok"]
        series.append((key, [(size, peak, peak, peak) for size, peak in held if peak]))
    what = "peak of a call besides inputs and results"
    title = f"{suite}: memory over {sweep.axis}"
    return _lines(sweep, title, what, series, styles, memory)


def _lines(
    sweep: Sweep,
    title: str,
    what: str,
    series: list[Series],
    styles: Styles,
    text: Callable[[float], str],
) -> Figure:
    series = [(key, points) for key, points in series if points]
    # ours last, above the others
    series.sort(key=lambda one: styles[one[0]].width)
    last = max(sweep.sizes, default=0)
    names = [
        name if points[-1][0] == last else f"{name} (to {number(points[-1][0])})"
        for (_, name), points in series
    ]
    notes = [what, pairs(sweep.base), *_disturbed_at(sweep)]
    left = 58 if text is memory else 46
    figure, axes = canvas(title, notes, _height(sweep), left=left, right=names_width(names))
    if not series:
        axes.set_axis_off()
        axes.text(0, 0.5, "no provider has such a number", color=MUTED)
        return figure
    values = [value for _, points in series for point in points for value in point[1:]]
    pad = (max(values) / min(values)) ** 0.05 if max(values) > min(values) else 1.5
    size_axis(axes, sweep.axis, sweep.sizes)
    ticks = byte_ticks if text is memory else log_ticks
    log_axis(axes.yaxis, min(values) / pad, max(values) * pad, text, ticks)
    for key, points in series:
        style = styles[key]
        xs, middles, lows, highs = zip(*points, strict=True)
        axes.fill_between(xs, lows, highs, color=style.colour, alpha=0.18, linewidth=0)
        axes.plot(xs, middles, color=style.colour, linestyle=style.dash, linewidth=style.width,
                  marker=style.marker, markersize=4,
                  markerfacecolor=style.colour if style.filled else "none")  # fmt: skip
    ends = [
        (name, *points[-1][:2], styles[key])
        for name, (key, points) in zip(names, series, strict=True)
    ]
    name_lines(axes, ends)
    return figure


def _height(sweep: Sweep) -> float:
    """The same for all charts of a sweep, and enough for the names, as long as some get."""
    names = [f"{name} (to {number(max(sweep.sizes))})" for name in sweep.names()]
    return max(210, names_height(names) - 16)


def _disturbed_at(sweep: Sweep) -> list[str]:
    pairs_ = zip(sweep.sizes, sweep.results, strict=True)
    sizes = [size for size, result in pairs_ if disturbed(result)]
    return [f"disturbed at {sweep.axis} = {listed(sizes)}"] if sizes else []


@look
def against_best(sweep: Sweep, suite: str) -> Figure:
    """Of ours over the best rival of each size, with the spread of both; dashed over the best one
    by our rule, where that is somebody else."""
    found, ruled = _speedups(sweep, best), _speedups(sweep, best_by_our_rule)
    notes = [f"best rival: {_who(sweep, best)}"]
    other = ruled if ruled and ruled != found else []
    if other:
        notes.append(f"dashed, not by its own rule: {_who(sweep, best_by_our_rule)}")
    title = f"{suite}: ours against the best rival over {sweep.axis}"
    figure, axes = canvas(title, [*notes, *_disturbed_at(sweep)], _height(sweep))
    if not found:
        axes.set_axis_off()
        axes.text(0, 0.5, "ours and a rival were timed at no size", color=MUTED)
        return figure
    low = min(1, *(one.low for _, one in found))
    high = max(1, *(one.high for _, one in found), *(one.median for _, one in other))
    size_axis(axes, sweep.axis, sweep.sizes)
    log_axis(axes.yaxis, min(low / 1.15, 0.7), max(high * 1.15, 1.4), lambda x: f"{number(x)}x")
    xs = [size for size, _ in found]
    axes.fill_between(xs, [r.low for _, r in found], [r.high for _, r in found], color=OURS,
                      alpha=0.18, linewidth=0)  # fmt: skip
    axes.plot(xs, [r.median for _, r in found], color=OURS, linewidth=2.4)
    if other:
        axes.plot([size for size, _ in other], [r.median for _, r in other], color=OURS,
                  linewidth=1.2, linestyle=(0, (5, 1.5)))  # fmt: skip
    for size, one in found:
        colour = SLOW if one.median < 1 else OURS
        axes.plot([size], [one.median], marker="v" if one.median < 1 else "o", color=colour,
                  markersize=6, linewidth=0, zorder=4)  # fmt: skip
    axes.axhspan(axes.get_ylim()[0], 1, color=SLOW, alpha=0.08, linewidth=0)
    axes.axhline(1, color=INK, linewidth=1)
    axes.annotate("ours is slower below", (1, 1), (-2, -4), ("axes fraction", "data"),
                  "offset points", ha="right", va="top", color=SLOW, fontsize=NOTE)  # fmt: skip
    return figure


def _speedups(sweep: Sweep, rival_of: Rival) -> list[tuple[float, Ratio]]:
    results = zip(sweep.sizes, sweep.results, strict=True)
    found = [(size, speedup(result, rival_of)) for size, result in results]
    return [(size, one) for size, one in found if one]


def _who(sweep: Sweep, rival_of: Rival) -> str:
    """The rivals and where each of them was the best."""
    runs = best_rivals(sweep, rival_of)
    return "; ".join(f"{name} ({listed(sizes)})" for name, sizes in runs) or "none was timed"
