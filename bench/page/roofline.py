"""The roofline of a suite: what is reached of the copy bandwidth and of the GEMM rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .canvas import NOTE, canvas, log_axis, look, point
from .facts import Result, best_by_our_rule, common, label, ours, seconds
from .style import INK, MUTED, Styles
from .words import per_second

# set-ups that are told in the chart, where more are only numbered
NAMED = 8


@look
def roofline(
    suite: str, results: Sequence[Result], ceilings: dict[str, Any], styles: Styles
) -> Figure:
    """What ours and the best rival by our rule, whose work is counted, reach of the two ceilings;
    the numbers are those of the set-ups in their order."""
    bandwidth, rate = ceilings["copy_bytes_per_s"], ceilings["flops_per_s"]
    points = [
        (i, r["cost"]["flops"] / r["cost"]["bytes"], r["cost"]["flops"] / seconds(r, row), row)
        for i, r in enumerate(results, 1)
        for row in (ours(r), best_by_our_rule(r))
        if row and row["ms"] and r["cost"]["flops"] and r["cost"]["bytes"]
    ]
    notes = [
        "blue: ours; tied to it: its best rival; numbers: the set-ups",
        f"ceilings: copy {per_second(bandwidth)}B/s, GEMM {per_second(rate)}FLOP/s"
        f" ({ceilings['dtype']})",
    ]
    if len(results) <= NAMED:
        shared = common(list(results))
        notes.append("; ".join(f"{i} {label(r, shared)}" for i, r in enumerate(results, 1)))
    figure, axes = canvas(f"{suite}: roofline", notes, 230, left=70, right=46)
    ridge = rate / bandwidth
    across = [ridge, *(x for _, x, _, _ in points)]
    low, high = min(across) / 4, max(across) * 4
    reached = [y for _, _, y, _ in points]
    bottom = min([low * bandwidth * 2, *reached]) / 2
    top = max([rate, *reached]) * 2.5
    log_axis(axes.xaxis, low, high)
    log_axis(axes.yaxis, bottom, top, per_second)
    axes.set_xlabel("FLOPs a byte")
    axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color=INK, linewidth=1.4)
    axes.text(high * 1.05, rate, "GEMM", va="center", fontsize=NOTE)
    axes.set_ylabel("counted FLOPs a second")
    _along(axes, ridge, bandwidth, low, [x for _, x, _, _ in points])
    by_setup: dict[int, list[tuple[float, float]]] = {}
    for i, x, y, row in points:
        by_setup.setdefault(i, []).append((x, y))
        point(axes, x, y, styles[row["kind"], row["name"]], 6 if row["kind"] == "ours" else 4.5)
    for ends in by_setup.values():
        axes.plot(*zip(*ends, strict=True), color=MUTED, linewidth=0.7, zorder=1)
    for text, x, y in _merged(
        axes, [(i, x, y) for i, x, y, row in points if row["kind"] == "ours"]
    ):
        axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=NOTE)
    return figure


def _along(axes: Axes, ridge: float, bandwidth: float, low: float, points: Sequence[float]) -> None:
    """The bandwidth's name along its slope, where there are no points."""
    places = [low * (ridge / low) ** share for share in (0.5, 0.65, 0.8, 0.35)]
    # of a point the number is right of it
    taken = [at * share for at in points for share in (1, 1.6)]
    x = max(places, key=lambda x: min((abs(math.log(x / at)) for at in taken), default=0.0))
    (x0, y0), (x1, y1) = axes.transData.transform(
        [(low, low * bandwidth), (ridge, ridge * bandwidth)]
    )
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    axes.annotate("copy", (x, x * bandwidth), (-3, 3), textcoords="offset points", rotation=angle,
                  ha="center", va="bottom", rotation_mode="anchor", fontsize=NOTE)  # fmt: skip


def _merged(
    axes: Axes, points: Sequence[tuple[int, float, float]]
) -> list[tuple[str, float, float]]:
    """Numbers of points, those of points that lie together in one text."""
    groups: list[tuple[list[int], float, float]] = []
    for i, x, y in points:
        here = axes.transData.transform((x, y))
        for found, x0, y0 in groups:
            there = axes.transData.transform((x0, y0))
            if abs(here - there)[0] < 14 and abs(here - there)[1] < 11:
                found.append(i)
                break
        else:
            groups.append(([i], x, y))
    return [(_few(found), x, y) for found, x, y in groups]


def _few(numbers: Sequence[int]) -> str:
    more = f" +{len(numbers) - 3}" if len(numbers) > 3 else ""
    return ", ".join(map(str, numbers[:3])) + more
