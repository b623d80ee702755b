"""``python -m bench.summary FOLDER SCRATCH``: one page, SUMMARY.md, of what bench/on_gpu.sh left.

SCRATCH holds ``phases``, lines of a phase's name, its exit status and its seconds with tabs
between; the JUnit files of the tests, and bench-*.json of the benchmarks, each of which kinds
becomes one file in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import record
from .report import floor_ms, milliseconds

# what `timeout` answers for a program that it stopped, by its signal or by kill
STOPPED = {"124": "stopped: out of time", "137": "killed: out of time"}
LONGEST = 12


def main(folder: Path, scratch: Path) -> None:
    suites = {path.stem: _suite(path) for path in sorted(scratch.glob("*.xml"))}
    whole = ElementTree.Element("testsuites")
    whole.extend(suite for suite in suites.values() if suite is not None)
    if len(whole):
        ElementTree.ElementTree(whole).write(folder / "tests.xml", encoding="unicode")
    phases = (scratch / "phases").read_text()
    run = _run(scratch)
    if run:
        record.write(folder / "bench.json", run.environment, run.results)
    (folder / "SUMMARY.md").write_text(page(phases, suites, run))


def _suite(path: Path) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError:
        return None


def page(phases: str, suites: dict[str, ElementTree.Element | None], run: record.Run | None) -> str:
    lines = ["# Run on a GPU", ""]
    if run:
        lines += [*_environment(run.environment), ""]
    lines += ["| phase | outcome | seconds |", "|---|---|---|"]
    for line in phases.splitlines():
        name, status, seconds = line.split("\t")
        outcome = "passed" if status == "0" else STOPPED.get(status, f"FAILED ({status})")
        lines.append(f"| {name} | {outcome} | {seconds} |")
    for name, suite in suites.items():
        lines += ["", *_tests(name, suite)]
    if run:
        for result in run.results:
            lines += ["", *_table(result, run.environment["ceilings"])]
    return "\n".join([*lines, ""])


def _run(scratch: Path) -> record.Run | None:
    """The benchmarks' files as one: each suite ran in a process of its own."""
    runs = [record.read(path) for path in sorted(scratch.glob("bench-*.json"))]
    if not runs:
        return None
    results = [result for run in runs for result in run.results]
    return record.Run(scratch, runs[0].environment, results)


def _environment(environment: dict[str, Any]) -> list[str]:
    gpu, versions, ceilings = environment["gpu"], environment["versions"], environment["ceilings"]
    dirty = ", uncommitted changes" if environment["dirty"] else ""
    return [
        f"{gpu['name']} (compute capability {gpu['capability']}, driver {gpu['driver']}),"
        f" CUDA {gpu['cuda_of_torch']}, nvcc {gpu['nvcc']}, torch {versions['torch']},"
        f" triton {versions['triton']}, Python {versions['python']}; commit"
        f" {environment['commit']}{dirty}, {environment['date']}.",
        "",
        f"Measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s read and written,"
        f" {ceilings['dtype']} products {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
        "Backends: "
        + "; ".join(f"{name}: {why or 'runs'}" for name, why in environment["backends"].items())
        + ".",
    ]


def _tests(name: str, suite: ElementTree.Element | None) -> list[str]:
    """Counts of a JUnit file, and the names of what failed."""
    if suite is None:
        return [f"{name}: its report was cut short"]
    cases = list(suite.iter("testcase"))
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error")}
    skipped = sum(c.find("skipped") is not None for c in cases)
    wrong = [*kinds["failure"], *kinds["error"]]
    lines = [f"{name}: {len(cases)} tests, {len(wrong)} failed, {skipped} skipped"]
    lines += [f"- {_label(c)}" for c in wrong[:LONGEST]]
    if len(wrong) > LONGEST:
        lines.append(f"- and {len(wrong) - LONGEST} more")
    return lines


def _label(case: ElementTree.Element) -> str:
    """Where the test is and the first line of why it failed."""
    reason = next(child for child in case if child.tag in ("failure", "error"))
    first = (reason.get("message") or "").strip().partition("\n")[0]
    return f"{case.get('classname')}.{case.get('name')}: {first[:200]}"


def _table(result: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    over = f"over {result['axis']}: " if result["axis"] else ""
    lines = [f"**{over}{record.label(result['suite'], result['params'])}**"]
    if "error" in result:
        return [*lines, "", f"FAILED: {result['error']}"]
    moved, computed = floor_ms(result["cost"], result["images"], ceilings)
    lines.append(
        f" (floor {milliseconds(moved)} by bytes, {milliseconds(computed)} by products; workspace"
        f" {result['workspace']['ratio']:.2f}x {result['workspace']['unit']})"
        if result["workspace"]
        else f" (floor {milliseconds(moved)} by bytes, {milliseconds(computed)} by products)"
    )
    lines += ["", "| provider | ms an image | p20, p80 | host ms a call | agreement |"]
    lines.append("|---" * 5 + "|")
    for row in result["rows"]:
        agreement = row["detail"].replace("|", "\\|").replace("\n", " ")[:160]
        if row["ms"]:
            median, low, high = (milliseconds(row["ms"][key]) for key in ("median", "p20", "p80"))
            host = "" if row["host_ms"] is None else f"{row['host_ms']:.3f}"
            lines.append(f"| {row['name']} | {median} | {low}, {high} | {host} | {agreement} |")
        else:
            lines.append(f"| {row['name']} | {row['status']} | | | {agreement} |")
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
