"""What the results of a run say, before anybody draws it: who is faster, by how much, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..case import OWN_RULE
from ..environment import QUIET
from ..record import Run
from .words import listed, number, pairs, times

Result = dict[str, Any]
Row = dict[str, Any]
# the rival of a set-up to hold ours against
Rival = Callable[[Result], Row | None]
# parameters that follow the one that a sweep varies
FOLLOWS = {"N": ("P",), "L": ("after",), "images": ("L", "after")}
# of the suite llava: who keeps every visual token
UNMODIFIED = "unmodified"


@dataclass(frozen=True)
class Ratio:
    """How many times as long the other takes; low and high by the 20th and 80th percentiles."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "even"

    def __str__(self) -> str:
        return times(self.median)


@dataclass(frozen=True)
class Sweep:
    """Set-ups that differ in ``axis`` alone, by size; errors: size -> why none was timed."""

    axis: str
    base: dict[str, Any]
    results: list[Result]
    errors: dict[Any, str]

    @property
    def sizes(self) -> list[float]:
        return [result["params"][self.axis] for result in self.results]

    @property
    def batched(self) -> bool:
        """Whether the number of images is what varies, so that only whole calls compare."""
        return len({result["images"] for result in self.results}) > 1

    def rows(self) -> dict[tuple[str, str], list[tuple[float, Result, Row]]]:
        """(kind, name) -> (size, its set-up, its row), also of what was not timed."""
        found: dict[tuple[str, str], list[tuple[float, Result, Row]]] = {}
        for size, result in zip(self.sizes, self.results, strict=True):
            for row in result["rows"]:
                found.setdefault((row["kind"], row["name"]), []).append((size, result, row))
        return found

    def names(self) -> list[str]:
        """Of those that were timed at one size at least."""
        rows = self.rows().items()
        return [name for (_, name), found in rows if any(row["ms"] for *_, row in found)]

    def scale(self, result: Result) -> float:
        """Of a row's milliseconds, to what the sweep compares."""
        return result["images"] if self.batched else 1.0

    @property
    def unit(self) -> str:
        return "ms a call" if self.batched else per(self.results)


def per(results: list[Result]) -> str:
    """The unit of a row's times."""
    unit = results[0].get("unit", "image") if results else "image"
    return f"ms {'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def ours(result: Result) -> Row | None:
    """The automatic choice, timed or not: a forced backend does not stand in for it."""
    return next((row for row in result["rows"] if row["kind"] == "ours"), None)


def best(result: Result) -> Row | None:
    """The fastest rival."""
    return _fastest(row for row in result["rows"] if row["kind"] == "rival")


def best_by_our_rule(result: Result) -> Row | None:
    """The fastest of those rivals that are not another method for the same end."""
    rivals = [row for row in result["rows"] if row["kind"] == "rival"]
    return _fastest(row for row in rivals if not row["scope"].startswith(OWN_RULE))


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((r for r in rows if r["ms"]), key=lambda row: row["ms"]["median"], default=None)


def ratio(mine: Row, other: Row) -> Ratio:
    a, b = mine["ms"], other["ms"]
    return Ratio(b["median"] / a["median"], b["p20"] / a["p80"], b["p80"] / a["p20"])


def speedup(result: Result, rival_of: Rival = best) -> Ratio | None:
    """Of ours over the best rival; None where either was not timed."""
    mine, rival = ours(result), rival_of(result)
    return ratio(mine, rival) if mine and mine["ms"] and rival else None


def split(run: Run) -> dict[str, tuple[list[Result], list[Sweep], list[Result]]]:
    """Suite -> its usual set-ups, its sweeps, and the usual set-ups that failed as a whole."""
    found = {}
    for suite in dict.fromkeys(result["suite"] for result in run.results):
        of = [result for result in run.results if result["suite"] == suite]
        usual = [r for r in of if r.get("axis") is None]
        failed = [r for r in usual if "error" in r]
        found[suite] = ([r for r in usual if "error" not in r], sweeps(of), failed)
    return found


def sweeps(results: list[Result]) -> list[Sweep]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        axis = result.get("axis")
        if axis is not None:
            groups.setdefault(repr((axis, _base(result))), []).append(result)
    found = []
    for group in groups.values():
        axis = group[0]["axis"]
        group.sort(key=lambda result: result["params"][axis])
        fine = [r for r in group if "error" not in r]
        errors = {r["params"][axis]: r["error"] for r in group if "error" in r}
        found.append(Sweep(axis, _base(group[0]), fine, errors))
    return found


def _base(result: Result) -> dict[str, Any]:
    moves = (result["axis"], *FOLLOWS.get(result["axis"], ()))
    return {key: value for key, value in result["params"].items() if key not in moves}


def common(results: list[Result]) -> dict[str, Any]:
    """The parameters that all of them share."""
    first, *others = [result["params"] for result in results]
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def label(result: Result, shared: dict[str, Any]) -> str:
    """What tells the set-up from its neighbours."""
    told = {key: value for key, value in result["params"].items() if key not in shared}
    return pairs(told) if told else "the usual set-up"


def disturbed(result: Result) -> bool:
    return (result.get("others_busy") or 0) > QUIET


def ceilings_of(run: Run) -> dict[str, Any] | None:
    """None where the run measured none that can be read as bytes and FLOPs a second."""
    found = run.environment.get("ceilings") or {}
    return found if {"copy_bytes_per_s", "flops_per_s"} <= found.keys() else None


def seconds(result: Result, row: Row) -> float:
    """Of a call, all images together."""
    return row["ms"]["median"] * result["images"] / 1e3


def share(result: Result, row: Row, ceilings: dict[str, Any] | None) -> float | None:
    """Of the ceiling that binds: the least time for the counted work over the time taken; None
    also of another method, whose work is not what was counted."""
    if not ceilings or not row["ms"] or row["scope"].startswith(OWN_RULE):
        return None
    return max(_floors(result["cost"], ceilings)) / seconds(result, row)


def binding(result: Result, ceilings: dict[str, Any]) -> str:
    moved, computed = _floors(result["cost"], ceilings)
    return "copy bandwidth" if moved >= computed else "GEMM rate"


def _floors(cost: dict[str, int], ceilings: dict[str, Any]) -> tuple[float, float]:
    return (
        cost["bytes"] / ceilings["copy_bytes_per_s"],
        cost["flops"] / ceilings["flops_per_s"],
    )


def where_it_stops(sweep: Sweep) -> str:
    """In words: the sizes where ours is slower than the best rival, and than the best one by our
    rule where that is somebody else."""
    text = _slower_at(sweep, best)
    others = any(best(result) is not best_by_our_rule(result) for result in sweep.results)
    # nowhere slower than any is nowhere slower than some
    if others and not text.startswith("nowhere"):
        text += f". Without those that go by their own rule: {_slower_at(sweep, best_by_our_rule)}"
    return text


def _slower_at(sweep: Sweep, rival_of: Rival) -> str:
    judged = {
        size: found
        for size, result in zip(sweep.sizes, sweep.results, strict=True)
        if (found := speedup(result, rival_of))
    }
    if not judged:
        return "not known: ours and a rival were timed at no size"
    slower = [size for size, found in judged.items() if found.median < 1]
    even = [size for size, found in judged.items() if found.verdict == "even"]
    span = f"{sweep.axis} = {number(min(judged))} to {number(max(judged))}"
    if not slower:
        text = f"nowhere in this range ({span})"
    elif len(slower) == len(judged):
        text = f"everywhere in this range ({span}) ours is slower than the best rival"
    else:
        text = f"at {sweep.axis} = {listed(slower)} ours is slower than the best rival"
    if even:
        text += f"; within the spread of the two at {sweep.axis} = {listed(even)}"
    noisy = [size for size, r in zip(sweep.sizes, sweep.results, strict=True) if disturbed(r)]
    if noisy:
        text += f"; disturbed at {sweep.axis} = {listed(noisy)}"
    unjudged = [size for size in [*sweep.sizes, *sweep.errors] if size not in judged]
    if unjudged:
        text += f"; not judged at {sweep.axis} = {listed(sorted(unjudged))}"
    return text


def best_rivals(sweep: Sweep, rival_of: Rival) -> list[tuple[str, list[float]]]:
    """Who was the best rival at which sizes, as runs of neighbouring sizes."""
    runs: list[tuple[str, list[float]]] = []
    for size, result in zip(sweep.sizes, sweep.results, strict=True):
        rival = rival_of(result)
        if rival is None:
            continue
        if runs and runs[-1][0] == rival["name"]:
            runs[-1][1].append(size)
        else:
            runs.append((rival["name"], [size]))
    return runs
