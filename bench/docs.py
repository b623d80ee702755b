"""``python -m bench.docs``: put what the kept runs measured into README.md and docs/.

Of each suite the newest kept run counts that is of a clean tree, all of one CPU and all of one GPU.
Nothing of it is typed: tables, sentences and pictures stand between the marks of a section.
``--check`` writes nothing, and fails where a page says other than the runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import llava_docs, serving
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
from .quality import report as quality
from .record import Run, read
from .report import headline, milliseconds, reached, span
from .suites import NAMES

RESULTS = ROOT / "bench" / "results"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
VLLM, QUALITY = ROOT / "docs" / "vllm.md", ROOT / "docs" / "quality.md"


def main(check: bool = False, folder: Path = RESULTS) -> None:
    kept = newest(folder)
    changed = []
    for page, sections in PAGES.items():
        text = page.read_text()
        for name, write in sections.items():
            text = put(text, name, write(kept, page), page)
        if text != page.read_text():
            changed.append(page.name)
            if not check:
                page.write_text(text)
    if check and changed:
        sys.exit(f"{', '.join(changed)}: not what the runs say; python -m bench.docs mends it")
    if not check:
        for each in kept:
            draw(each)
        draw_laboratory()


@dataclass(frozen=True)
class Kept:
    """What is kept of a machine: the newest run of each suite."""

    device: str
    runs: dict[str, Run]

    @property
    def newest(self) -> Run:
        return max(self.runs.values(), key=lambda run: str(run.environment["date"]))

    def rank(self) -> tuple[int, str]:
        return len(self.runs), str(self.newest.environment["date"])

    @property
    def whole(self) -> Run:
        """All of it as one run, of the newest one's environment."""
        results = [
            r for suite, run in self.runs.items() for r in run.results if r["suite"] == suite
        ]
        return Run(self.newest.path, self.newest.environment, results)

    def sources(self, page: Path) -> str:
        """Which files say what, and of which commit."""
        files: dict[Path, list[str]] = {}
        for suite, run in self.runs.items():
            files.setdefault(run.path, []).append(suite)
        runs = {run.path: run for run in self.runs.values()}
        return "; ".join(
            f"{', '.join(suites)}: commit {runs[path].environment['commit']}, {link(path, page)}"
            for path, suites in files.items()
        )


def newest(folder: Path) -> list[Kept]:
    """Of each device the machine of which most suites are kept, and of those the one measured last,
    the CPU first. Where it lacks a suite there are no pages to write."""
    machines: dict[tuple[str, ...], dict[str, Run]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = read(path)
        except ValueError:
            continue
        if run.environment["dirty"] or run.environment.get("quick", True):
            continue
        of = machines.setdefault(_hardware(run.environment), {})
        for suite in {result["suite"] for result in run.results if "rows" in result}:
            if suite not in of or of[suite].environment["date"] < run.environment["date"]:
                of[suite] = run
    found: dict[str, list[Kept]] = {"cpu": [], "cuda": []}
    for (device, *_), runs in machines.items():
        if runs:
            found[device].append(Kept(device, {s: runs[s] for s in NAMES if s in runs}))
    best = [max(each, key=Kept.rank) for each in found.values() if each]
    known = best[0].runs if found["cpu"] else {}
    if missing := [suite for suite in NAMES if suite not in known]:
        sys.exit(f"{folder} has no run on a CPU of a clean tree of {', '.join(missing)}")
    return best


def _hardware(environment: dict[str, Any]) -> tuple[str, ...]:
    """The device and what else the rows of a table must have in common."""
    if "gpu" in environment:
        return environment["device"], environment["gpu"]["name"]
    cpu = (str(environment[name]) for name in ("cpu", "cpu_capability", "threads"))
    return environment["device"], *cpu


def put(text: str, name: str, section: str, page: Path) -> str:
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    if begin not in text or end not in text:
        sys.exit(f"{page} has no place for {name}: lines {begin.strip()} and {end.strip()}")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + section.rstrip() + "\n" + end + after


def picture(kept: Kept) -> Path:
    return ROOT / "docs" / f"speed-{kept.device}.png"


def draw(kept: Kept) -> None:
    from .page import run_section
    from .page.charts import overview
    from .page.svg import png

    png(overview(kept.whole), picture(kept), run_section.source(kept.newest.environment))


def link(path: Path, page: Path) -> str:
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    return f"[{path.name}]({up}{path.resolve().relative_to(ROOT)})"


def machine(kept: Kept) -> str:
    """The device and its software, without a commit."""
    return headline(kept.newest.environment).rpartition(", commit ")[0]


def speed(kept: list[Kept], page: Path) -> str:
    """The README's: ours and the fastest rival of each usual set-up."""
    lines: list[str] = []
    for each in kept:
        lines += [
            f"{machine(each)}. Milliseconds an image or a sequence, median [20th, 80th"
            " percentile]; every result was checked before it was timed. The rival is the fastest"
            " one that does the same.",
            "",
            "| | ours | fastest rival | | ours is faster |",
            "|---|---:|---|---:|---:|",
        ]
        for suite, (results, _, _) in split(each.whole).items():
            if suite != "llava":
                lines += [_fastest(suite, result, common(results)) for result in results]
        lines += [
            "",
            f"From {each.sources(page)}.",
            "",
            "<details><summary>Everybody in one picture</summary>",
            "",
            f"![How many times as long as ours everybody takes]"
            f"({picture(each).relative_to(page.parent)})",
            "",
            "</details>",
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


def model(kept: list[Kept], page: Path) -> str:
    """The README's sentence on a whole model."""
    runs = [(each, each.runs["llava"]) for each in kept if "llava" in each.runs]
    return "\n\n".join(
        f"{machine(each)}: {llava_docs.sentence(run)} ({link(run.path, page)})."
        for each, run in runs
    )


def models(kept: list[Kept], page: Path) -> str:
    runs = [(each, each.runs["llava"]) for each in kept if "llava" in each.runs]
    return "\n".join(
        f"{machine(each)}, {link(run.path, page)}; {llava_docs.section(run)}" for each, run in runs
    )


def serving_table(kept: list[Kept], page: Path) -> str:
    """The newest run of the servers."""
    found = [(json.loads(path.read_text())["serving"], path) for path in RESULTS.glob("serving-*")]
    clean = [each for each in found if not each[0]["environment"]["dirty"]]
    if not clean:
        return ""
    run, path = max(clean, key=lambda each: str(each[0]["environment"]["date"]))
    params, versions = run["params"], run["environment"]["versions"]
    head = headline(run["environment"]).rpartition(", commit ")[0]
    return (
        f"{head}, {versions['vllm']}, a LLaVA-1.5 of size {params['model']} and random weights:"
        f" {params['concurrency']} requests at a time, each an image of {params['image_tokens']}"
        f" tokens of its own, {params['words']} words and {params['answer']} tokens of answer;"
        f" VMTC leaves {params['primary']} + {params['merged']} tokens, CMAI inhibits in all"
        f" layers; {params['rounds']} rounds of {params['requests']} requests to each server in"
        " turn, median [least, most], and how many times that of vLLM as it is"
        f" ({link(path, page)})."
        f"\n\n{serving.summary(run)}"
    )


def tables(kept: list[Kept], page: Path) -> str:
    """Of each usual set-up every provider, and of each sweep how time grows and who is faster."""
    lines: list[str] = []
    for each in kept:
        environment = each.newest.environment
        lines.append(f"{machine(each)}: `{environment['command']}`.")
        if environment["ceilings"]:
            lines[-1] += f" In that run the machine {reached(environment['ceilings'])}."
        lines[-1] += f" {each.sources(page)}."
        for suite, (results, sweeps, failed) in split(each.whole).items():
            if suite == "llava":
                continue
            lines += ["", f"### {suite}", "", *_suite(results)]
            lines += [f"- failed: {label(one, {})}: {one['error']}" for one in failed]
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
        found = [
            next((row for row in result["rows"] if row["name"] == name), None) for result in results
        ]
        if any(row and row["ms"] for row in found):
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


def _laboratory(name: str = "quality") -> quality.Found:
    """The newest run of the laboratory, or of what confirms it."""
    found = [quality.Found(path) for path in RESULTS.glob(f"{name}-*.json")]
    return max(found, key=lambda each: str(each.run["environment"]["date"]))


def draw_laboratory() -> None:
    quality.draw(_laboratory(), ROOT / "docs")


def _of_laboratory(name: str) -> Callable[[list[Kept], Path], str]:
    def write(kept: list[Kept], page: Path) -> str:
        found = _laboratory()
        return f"{quality.sections(found)[name]}\n\n{link(found.path, page)}"

    return write


def _confirmed(kept: list[Kept], page: Path) -> str:
    found = _laboratory("confirmed")
    return f"{quality.confirmed(found)}\n\n{link(found.path, page)}"


PAGES: dict[Path, dict[str, Callable[[list[Kept], Path], str]]] = {
    README: {"bench": speed, "model": model, "serving": serving_table},
    VLLM: {"serving": serving_table},
    BENCHMARKS: {"bench": tables, "llava": models},
    QUALITY: {
        **{name: _of_laboratory(name) for name in quality.SECTIONS},
        "confirmed": _confirmed,
    },
}


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
