"""Numbers in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def number(value: float) -> str:
    """Three digits that count, and no exponent where it can be read without."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}"
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def measured(value: float) -> str:
    """Three digits, zeros included."""
    return number(value) if abs(value) >= 100 or abs(value) < 1e-4 else f"{value:#.3g}"


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def per_second(value: float) -> str:
    """To be followed by what there are so many of a second."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value)} "


def when(date: str) -> str:
    """Of an ISO date the day and the minute."""
    day, _, time = date.partition("T")
    return f"{day} {time[:5]}{' UTC' if time.endswith(('Z', '+00:00')) else ''}".strip()


def listed(values: Iterable[float]) -> str:
    return ", ".join(number(value) for value in values)


def memory(count: float) -> str:
    """Bytes in a unit that leaves a readable number."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{number(count)} B"


def pairs(params: dict[str, Any]) -> str:
    """``D=1024 cosine``: a word says by itself what it is."""
    told = params.items()
    return " ".join(str(v) if isinstance(v, str) else f"{k}={v}" for k, v in told)
