"""The report of a folder of runs: one page that needs nothing else, and its charts as PNGs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import record
from ..record import Run
from . import run_section
from .html import Album, Html, join, tag
from .style import SHEET, styles

PAGE = "report.html"


def main(folder: Path, out: Path | None = None) -> Path:
    """Reads every run of the folder, writes report.html and PNGs into ``out``, by itself the
    folder, and returns the page's path. Raises ValueError where there is no run."""
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    runs, others = read(folder)
    for name in others:
        print(f"{name} is skipped: no file of a run", file=sys.stderr)
    if not runs:
        raise ValueError(f"{folder} holds no file of a run")
    path = out / PAGE
    path.write_text(page(runs, others, out), encoding="utf-8")
    return path


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """Its runs, newest first, and the names of the JSON files that are none."""
    runs, others = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(record.read(path))
        except ValueError:
            others.append(path.name)
    runs.sort(key=lambda run: str(run.environment.get("date", "")), reverse=True)
    return runs, others


def page(runs: list[Run], others: list[str], out: Path) -> str:
    sections = []
    taken: set[str] = set()
    for i, (run, looks) in enumerate(zip(runs, styles([run.results for run in runs]), strict=True)):
        album = Album(out, run.path.stem, run_section.source(run.environment), taken)
        sections.append(run_section.section(run, looks, album, number=i))
    title = "vmtc_kernels: benchmarks"
    skipped = f"Skipped, as no file of a run: {', '.join(others)}." if others else ""
    body = [
        tag("header", tag("h1", title), *_reading(), _links(runs)),
        tag("main", join(sections)),
        tag("footer", tag("p", skipped, class_="note") if skipped else ""),
    ]
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(SHEET)),
    ]
    whole = tag("html", tag("head", join(head)), tag("body", join(body)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _reading() -> list[Any]:
    return [
        tag(
            "p",
            "A provider is timed only after its result agrees with the reference; one that fails"
            " or is not installed is listed and not timed. Every sample counts. A time is the"
            " median, a spread runs from the 20th to the 80th percentile. A rival often does less"
            " than ours: what it does is said beside its name.",
        ),
        tag(
            "p",
            "Ours is the automatic choice of a backend. It is called faster or slower only where"
            " the two spreads do not meet.",
        ),
    ]


def _links(runs: list[Run]) -> Html:
    links = [
        tag("li", tag("a", run_section.device(run.environment), href=f"#run-{i}"),
            f", {run_section.date(run.environment)}, {run.path.name}")
        for i, run in enumerate(runs)
    ]  # fmt: skip
    return tag("nav", tag("ul", *links), aria_label="runs") if len(runs) > 1 else Html("")
