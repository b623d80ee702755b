"""``python -m bench.docs``: put what the kept runs measured into README.md and docs/.

Of each device the newest kept run counts that is of a clean tree and has every suite. Nothing of it
is typed: tables, sentences and pictures stand between the marks of a section. ``--check`` writes
nothing, and fails where a page says other than the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import llava_docs
from .environment import ROOT
from .page.facts import (
    Result,
    Sweep,
    best_by_our_rule,
    best_rivals,
    common,
    disturbed,
    label,
    ours,
    per,
    seconds,
    speedup,
    split,
    where_it_stops,
)
from .page.growth import fit
from .record import Run, read
from .report import headline, milliseconds, reached, span
from .suites import NAMES

RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"


def main(check: bool = False, folder: Path = RESULTS) -> None:
    runs = newest(folder)
    changed = []
    for page, sections in PAGES.items():
        text = page.read_text()
        for name, write in sections.items():
            text = put(text, name, write(runs, page), page)
        if text != page.read_text():
            changed.append(page.name)
            if not check:
                page.write_text(text)
    if check and changed:
        sys.exit(f"{', '.join(changed)}: not what the runs say; python -m bench.docs mends it")
    if not check:
        for run in runs:
            draw(run)


def newest(folder: Path) -> list[Run]:
    """Of each device the newest run of a clean tree that has all suites; CPUs first."""
    found: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = read(path)
        except ValueError:
            continue
        suites = {result["suite"] for result in run.results if "rows" in result}
        if run.environment["dirty"] or run.environment.get("quick", True) or suites < set(NAMES):
            continue
        device = run.environment["device"]
        if device not in found or found[device].environment["date"] < run.environment["date"]:
            found[device] = run
    if "cpu" not in found:
        sys.exit(f"{folder} has no run on a CPU of a clean tree with all suites")
    return [found[device] for device in ("cpu", "cuda") if device in found]


def put(text: str, name: str, section: str, page: Path) -> str:
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    if begin not in text or end not in text:
        sys.exit(f"{page} has no place for {name}: lines {begin.strip()} and {end.strip()}")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + section.rstrip() + "\n" + end + after


def picture(run: Run) -> Path:
    return ROOT / "docs" / f"speed-{run.environment['device']}.png"


def draw(run: Run) -> None:
    from .page.charts import overview
    from .page.svg import png

    png(overview(run), picture(run), run.path.name)


def link(path: Path, page: Path) -> str:
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    return f"[{path.name}]({up}{path.resolve().relative_to(ROOT)})"


def source(run: Run, page: Path) -> str:
    return f"{headline(run.environment)}: {link(run.path, page)}"


def speed(runs: list[Run], page: Path) -> str:
    """The README's: ours and the fastest rival of each usual set-up."""
    lines: list[str] = []
    for run in runs:
        lines += [
            f"{source(run, page)}. Milliseconds an image or a sequence, median [20th, 80th"
            " percentile]; every result was checked before it was timed.",
            "",
            "| | ours | fastest rival | | ours is faster |",
            "|---|---:|---|---:|---:|",
        ]
        for suite, (results, _, _) in split(run).items():
            shared = common(results)
            lines += [_fastest(suite, result, shared) for result in results]
        lines += [
            "",
            f"![How many times as long as ours everybody takes]"
            f"({picture(run).relative_to(page.parent)})",
            "",
        ]
    return "\n".join(lines)


def _fastest(suite: str, result: Result, shared: dict[str, Any]) -> str:
    mine, rival, found = ours(result), best_by_our_rule(result), speedup(result, best_by_our_rule)
    cells = [f"**{suite}** {label(result, shared)}", timed(mine)]
    cells += [rival["name"] if rival else "none", timed(rival)]
    cells.append(f"{found.median:.2f}x" if found else "")
    if disturbed(result):
        cells[0] += " (disturbed)"
    return "| " + " | ".join(cells) + " |"


def timed(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{milliseconds(row['ms']['median'])} {span(row)}" if row["ms"] else row["status"]


def model(runs: list[Run], page: Path) -> str:
    """The README's sentence on a whole model."""
    return "\n\n".join(
        f"{device(run)}: {llava_docs.sentence(run)} ({link(run.path, page)})." for run in runs
    )


def device(run: Run) -> str:
    found = run.environment
    if "gpu" in found:
        return found["gpu"]["name"]
    return f"{found['cpu']}, {found['threads']} threads"


def models(runs: list[Run], page: Path) -> str:
    return "\n".join(f"{source(run, page)}, {llava_docs.section(run)}" for run in runs)


def tables(runs: list[Run], page: Path) -> str:
    """Of each usual set-up every provider, and of each sweep how time grows and who is faster."""
    lines: list[str] = []
    for run in runs:
        lines += [f"{source(run, page)}; `{run.environment['command']}`. "]
        if run.environment["ceilings"]:
            lines[-1] += f"In the same run the machine {reached(run.environment['ceilings'])}."
        for suite, (results, sweeps, failed) in split(run).items():
            if suite == "llava":
                continue
            lines += ["", f"### {suite}", "", *_suite(results)]
            lines += [f"- failed: {label(each, {})}: {each['error']}" for each in failed]
            lines += ["", *(line for sweep in sweeps for line in _sweep(sweep))]
        lines.append("")
    return "\n".join(lines)


def _suite(results: list[Result]) -> Iterator[str]:
    shared = common(results)
    told = ", ".join(f"{key}={value}" for key, value in shared.items())
    yield f"{per(results).capitalize()}; {told}."
    yield ""
    yield "| | does | " + " | ".join(label(result, shared) for result in results) + " |"
    yield "|---|---" + "|---:" * len(results) + "|"
    rows = {row["name"]: row for result in results for row in result["rows"]}
    absent: dict[str, list[str]] = {}
    for name, one in rows.items():
        found = [next(r for r in result["rows"] if r["name"] == name) for result in results]
        if any(row["ms"] for row in found):
            cells = [name, one["scope"], *map(timed, found)]
            yield "| " + " | ".join(cells) + " |"
        else:
            absent.setdefault(f"{one['status']}: {one['detail']}", []).append(name)
    yield ""
    yield from (f"- {'; '.join(names)} {why}" for why, names in absent.items())


def _sweep(sweep: Sweep) -> Iterator[str]:
    mine = [(s, r, ours(r)) for s, r in zip(sweep.sizes, sweep.results, strict=True)]
    points = [(size, seconds(result, row)) for size, result, row in mine if row and row["ms"]]
    if not points:
        return
    found = fit(*zip(*points, strict=True))
    rivals = "; ".join(
        f"{name} up to {places[-1]:g}" for name, places in best_rivals(sweep, best_by_our_rule)
    )
    ratios = [
        f"{size:g}: {ratio.median:.2f}x"
        for size, result, _ in mine
        if (ratio := speedup(result, best_by_our_rule))
    ]
    yield (
        f"- over **{sweep.axis}**: a call takes time ~ {sweep.axis}^({found}). The fastest rival"
        f" ({rivals}) takes {', '.join(ratios)} as long. Where ours is slower:"
        f" {where_it_stops(sweep)}."
    )


PAGES: dict[Path, dict[str, Callable[[list[Run], Path], str]]] = {
    README: {"bench": speed, "model": model},
    BENCHMARKS: {"bench": tables, "llava": models},
}


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
