"""``vmtc bench compare A B``: which rows of B are slower or faster than those of A.

A row is slower where all of this holds, and faster where it holds the other way round:

- its 20th percentile lies above the old 80th: beyond the spread of both;
- its median is more than 3% above the old one: clocks and memory differ that much from run to run;
- the samples of two runs of equal speed would be ordered so less than once in 500 times (rank sum).
  It takes six samples of each; a row of fewer is not judged, nor one timed beside other processes.

Rows belong together by suite, swept parameter, parameters and name. Only ours decide the exit
status; where rivals, the reference and floors moved as much, the machine or a library changed.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import record
from .environment import QUIET

# of the medians
LEAST = 1.03
# the rank sum lies so many standard deviations from its mean
CHANCE = statistics.NormalDist().inv_cdf(1 - 1 / 500)
# what fails where it is said of ours
LOST = ("failed now", "missing now", "gone")
WORSE = ("slower", *LOST)
NOT_JUDGED = ("disturbed", "few samples")
_STYLE = {**dict.fromkeys(WORSE, "red"), **dict.fromkeys(NOT_JUDGED, "yellow"), "faster": "green"}

Times = dict[str, float]


@dataclass
class Row:
    """old, new: median, p20 and p80, milliseconds an image, where they were measured.

    flag: one of the words above, ``faster``, ``new``, or empty where there is nothing to tell.
    """

    setup: str
    name: str
    kind: str
    old: Times | None
    new: Times | None
    flag: str
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.new["median"] / self.old["median"] if self.old and self.new else math.nan


def main(a: Path, b: Path, console: Console, *, every: bool = False) -> int:
    """Print what changed from run a to run b; every: and what did not. Returns the exit status: 1
    where something of ours is slower, fails or is gone, 2 where nothing can be compared."""
    try:
        old, new = record.read(a), record.read(b)
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    rows = compare(old, new)
    worse = [row for row in rows if row.kind == "ours" and row.flag in WORSE]
    if not worse and not any(row.old and row.new for row in rows):
        console.print(f"{a} and {b} have no timed row in common", style="red", markup=False)
        return 2
    for line in headline(old, new):
        console.print(line, highlight=False)
    for _, group in itertools.groupby(rows, lambda row: row.setup):
        shown = [row for row in group if every or row.flag not in ("", *NOT_JUDGED)]
        # what only moved beside ours is in the summary
        if every or any(row.kind == "ours" or row.flag in LOST for row in shown):
            _show(console, shown)
    for line in [*summary(rows), *alone(old, new)]:
        console.print(line, highlight=False)
    told = "nothing of ours is slower, fails or is gone"
    if worse:
        counts = Counter(row.flag for row in worse)
        told = "of ours: " + ", ".join(f"{n} {flag}" for flag, n in counts.items())
    console.print(told, style="red" if worse else "green", highlight=False)
    return int(bool(worse))


def compare(old: record.Run, new: record.Run) -> list[Row]:
    """The rows of the set-ups that both have."""
    before, after = _setups(old), _setups(new)
    return [row for key in before if key in after for row in _setup(before[key], after[key])]


def judge(old: dict[str, Any] | None, new: dict[str, Any] | None, disturbed: bool) -> str:
    """The flag of a row as the runs recorded it, one of which may not have it."""
    before, after = (row["status"] if row else "gone" for row in (old, new))
    if before == after == "ok":
        assert old and new
        return "disturbed" if disturbed else _speed(old, new)
    if after == "ok":
        return "new"
    if after == "failed":
        return "failed now" if before != "failed" else ""
    return {"missing": "missing now", "gone": "gone"}[after] if before == "ok" else ""


def _speed(old: dict[str, Any], new: dict[str, Any]) -> str:
    order = _order(new["samples_ms"], old["samples_ms"])
    if order is None:
        return "few samples"
    for flag, slow, fast, sign in (("slower", new, old, 1), ("faster", old, new, -1)):
        apart = slow["ms"]["p20"] > fast["ms"]["p80"]
        far = slow["ms"]["median"] > LEAST * fast["ms"]["median"]
        if apart and far and sign * order > CHANCE:
            return flag
    return ""


def _order(a: list[float], b: list[float]) -> float | None:
    """How far a lies above b: the rank sum in standard deviations; None where even the farthest
    would not tell."""
    left, right = np.array(a)[:, None], np.array(b)[None]
    pairs = left.size * right.size
    deviation = math.sqrt(pairs * (left.size + right.size + 1) / 12)
    if pairs / 2 <= CHANCE * deviation:
        return None
    above = (left > right).sum() + (left == right).sum() / 2
    return float(above - pairs / 2) / deviation


def _setups(run: record.Run) -> dict[str, dict[str, Any]]:
    return {
        json.dumps([r["suite"], r.get("axis"), r["params"]], sort_keys=True): r for r in run.results
    }


def _setup(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    label = record.label(old["suite"], old["params"])
    if old.get("axis"):
        label += f" ({old['axis']} varies)"
    disturbed = any((result.get("others_busy") or 0) > QUIET for result in (old, new))
    before, after = ({row["name"]: row for row in r.get("rows", [])} for r in (old, new))
    if "error" in new:
        # with the set-up as a whole fails all that it had
        failed = {"status": "failed", "ms": None, "detail": new["error"]}
        after = {name: {**row, **failed} for name, row in before.items()}
    rows = []
    for name in {**before, **after}:
        was, now = before.get(name), after.get(name)
        known = now or was
        assert known
        flag = judge(was, now, disturbed)
        note = known["detail"] if flag in ("failed now", "missing now") else ""
        times = was["ms"] if was else None, now["ms"] if now else None
        rows.append(Row(label, name, known["kind"], *times, flag, note))
    _add_company(rows)
    return rows


def _add_company(rows: list[Row]) -> None:
    """Note beside ours what others of the set-up changed as much: the machine may have."""
    for row in rows:
        others = [other for other in rows if other.kind != "ours" and other.flag == row.flag]
        if row.kind == "ours" and row.flag in ("slower", "faster"):
            far = abs(math.log(row.ratio)) - math.log(LEAST)
            as_much = [other for other in others if abs(math.log(other.ratio)) >= far]
            told = ", ".join(f"{other.name} {other.ratio:.2f}x" for other in as_much)
            row.note = f"as is {told}: the machine or a library?" if as_much else ""


def headline(old: record.Run, new: record.Run) -> list[str]:
    lines = []
    for run in (old, new):
        commit, date = run.environment["commit"], run.environment["date"][:10]
        dirty = "[yellow], uncommitted changes[/]" if run.environment["dirty"] else ""
        lines.append(f"{escape(run.path.name)}: {_device(run)}, {date}, commit {commit}{dirty}")
    before, after = _conditions(old), _conditions(new)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            lines.append(f"[yellow]not the same {name}: {before.get(name)}, {after.get(name)}[/]")
    return lines


def _device(run: record.Run) -> str:
    found = run.environment
    return found["gpu"]["name"] if "gpu" in found else f"{found['cpu']} ({found['cpu_capability']})"


def _conditions(run: record.Run) -> dict[str, Any]:
    """What else the times depend on."""
    versions = {k: v for k, v in run.environment["versions"].items() if k != "vmtc_kernels"}
    return {"device": _device(run), "threads": run.environment["threads"], **versions}


def summary(rows: list[Row]) -> list[str]:
    """How many rows were compared and what came out, of ours and of the others."""
    compared = [row for row in rows if row.old and row.new]
    ours = [row for row in compared if row.kind == "ours"]
    others = [row for row in compared if row.kind != "ours"]
    lines = [f"{len(ours)} rows of ours compared: {_told(ours)}"]
    lines.append(f"{len(others)} of rivals, references and floors: {_told(others)}")
    for name in sorted({row.name for row in others if row.flag in ("slower", "faster")}):
        lines.append(f"  {name}: {_told([row for row in others if row.name == name])}")
    if any(row.flag == "disturbed" for row in rows):
        lines.append("[yellow]disturbed: other processes were busy meanwhile; not judged[/]")
    if any(row.flag == "few samples" for row in rows):
        lines.append("[yellow]few samples: fewer than six in one of the runs; not judged[/]")
    return lines


def _told(rows: list[Row]) -> str:
    if not rows:
        return "none"
    counts = Counter(row.flag or "within the spread" for row in rows)
    told = ", ".join(f"{n} {flag}" for flag, n in sorted(counts.items()))
    return f"{told}; median ratio {statistics.median(row.ratio for row in rows):.2f}x"


def alone(old: record.Run, new: record.Run) -> list[str]:
    """The set-ups that one run has alone: it may be of some suites only."""
    before, after = _setups(old), _setups(new)
    lines = []
    for run, mine, others in ((old, before, after), (new, after, before)):
        suites = Counter(mine[key]["suite"] for key in mine if key not in others)
        if suites:
            told = ", ".join(f"{suite} {n}" for suite, n in suites.items())
            lines.append(f"set-ups in {escape(run.path.name)} alone: {told}")
    return lines


def _show(console: Console, rows: list[Row]) -> None:
    console.print(f"\n[bold]{escape(rows[0].setup)}[/]", highlight=False)
    table = Table(box=box.SIMPLE)
    for heading in ("provider", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("old ms", "new ms", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}x"
        told = f"{row.flag}, {row.note}" if row.note else row.flag
        cells = (row.name, row.kind, _times(row.old), _times(row.new), ratio, told)
        table.add_row(*(Text(cell) for cell in cells), style=_STYLE.get(row.flag, ""))
    console.print(table)


def _times(ms: Times | None) -> str:
    if not ms:
        return ""
    median, low, high = (
        f"{ms[key]:.3g}" if ms[key] < 1000 else f"{ms[key]:.0f}" for key in ("median", "p20", "p80")
    )
    return f"{median} [{low}, {high}]"
