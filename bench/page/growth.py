"""How a cost grows with a size: the power law that fits best in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# the fewest sizes that a fit over the largest sizes alone is made of
FEWEST = 3


@dataclass(frozen=True)
class Fit:
    """cost ~ size^exponent; error: the exponent's standard error, None of two sizes."""

    exponent: float
    error: float | None
    smallest: float
    largest: float

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.2f}"
        # no minus before a zero
        return f"{round(self.exponent, 2) + 0.0:.2f}{spread}"


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """Least squares of log cost on log size; None of fewer than two different sizes.

    The error is that of the scatter about the line. Where the true curve bends it tells how far
    from a power law the costs are, and not how well they were measured.
    """
    points = [(math.log(s), math.log(c)) for s, c in zip(sizes, costs, strict=True)]
    if len({x for x, _ in points}) < 2:
        return None
    count = len(points)
    mean_x, mean_y = (math.fsum(values) / count for values in zip(*points, strict=True))
    square = math.fsum((x - mean_x) ** 2 for x, _ in points)
    exponent = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / square
    error = None
    if count > 2:
        off = math.fsum((y - mean_y - exponent * (x - mean_x)) ** 2 for x, y in points)
        error = math.sqrt(off / (count - 2) / square)
    return Fit(exponent, error, min(sizes), max(sizes))


def fit_largest(sizes: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """Of the larger half of the sizes, where constant costs count least; None of too few."""
    points = sorted(zip(sizes, costs, strict=True))
    kept = points[-max(FEWEST, math.ceil(len(points) / 2)) :]
    if len(kept) < FEWEST or len(kept) == len(points):
        return None
    return fit(*zip(*kept, strict=True))
