"""A run's part of the report: what was measured on what, what to beware of, who won."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..environment import QUIET
from ..record import Run
from . import suite_section, verdict
from .facts import Result, ceilings_of, common, disturbed, label, ours, split
from .html import Album, Html, items, join, tag
from .style import Styles
from .words import per_second, when


def section(run: Run, looks: Styles, album: Album, number: int) -> Html:
    suites = split(run)
    parts = [
        tag("p", tag("code", str(run.environment.get("command", "command unknown")))),
        _headline(run.environment),
        _warnings(run),
        *verdict.verdicts(run),
        _not_timed(run),
    ]
    for name, (usual, sweeps, failed) in suites.items():
        suite = suite_section.Suite(name, usual, sweeps, failed, looks, ceilings_of(run))
        parts.append(suite_section.section(suite, album))
    whole = json.dumps(run.environment, indent=1)
    parts.append(
        tag(
            "details",
            tag("summary", "The whole environment"),
            tag("pre", whole, class_="scroll", tabindex="0"),
        )
    )
    environment = run.environment
    summary = tag(
        "summary",
        tag("h2", device(environment)),
        tag("span", _brief(run), class_="small"),
    )
    # the link above leads to what is inside, so that a browser opens it
    inside = tag("div", join(parts), id=f"run-{number}")
    return tag("details", summary, inside, class_="run", **({} if number else {"open": "open"}))


def device(environment: dict[str, Any]) -> str:
    named = environment.get("gpu") or {}
    return str(named.get("name") or environment.get("cpu") or "unknown device")


def source(environment: dict[str, Any]) -> str:
    """A line of what the numbers were measured on."""
    threads = "" if environment.get("gpu") else f", {environment.get('threads')} threads"
    return f"{device(environment)}{threads}, commit {commit(environment)}"


def commit(environment: dict[str, Any]) -> str:
    changed = " with uncommitted changes" if environment.get("dirty") else ""
    return f"{environment.get('commit', 'unknown')}{changed}"


def date(environment: dict[str, Any]) -> str:
    return when(str(environment.get("date", "no date")))


def _brief(run: Run) -> str:
    environment = run.environment
    return f"{date(environment)}, commit {commit(environment)}, {run.path.name}"


def _headline(environment: dict[str, Any]) -> Html:
    gpu = environment.get("gpu") or {}
    versions = environment.get("versions") or {}
    ceilings = environment.get("ceilings") or {}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    facts: dict[str, Any] = {"device": device(environment)}
    if gpu:
        facts["GPU"] = (
            f"compute capability {gpu.get('capability')}, driver {gpu.get('driver')},"
            f" CUDA {gpu.get('cuda_of_torch')}, nvcc {gpu.get('nvcc')}"
        )
    facts["processor"] = (
        f"{environment.get('cpu')} ({environment.get('cpu_capability')}),"
        f" {environment.get('threads')} of {environment.get('cores')} threads"
    )
    facts["date"] = date(environment)
    facts["commit"] = commit(environment)
    facts["versions"] = there + (f"; not installed: {absent}" if absent else "")
    if {"copy_bytes_per_s", "flops_per_s"} <= ceilings.keys():
        facts["ceilings"] = (
            f"copy {per_second(ceilings['copy_bytes_per_s'])}B/s read and written,"
            f" {ceilings['dtype']} products {per_second(ceilings['flops_per_s'])}FLOP/s"
        )
    pairs = [part for key, value in facts.items() for part in (tag("dt", key), tag("dd", value))]
    return tag("dl", *pairs, class_="facts")


def _warnings(run: Run) -> Html:
    lines = [tag("li", tag("strong", head), f" {text}") for head, text in warnings(run)]
    return tag("ul", *lines, class_="warnings", aria_label="beware") if lines else Html("")


def warnings(run: Run) -> Iterator[tuple[str, str]]:
    """What keeps a number from being believed, in a word and in a sentence."""
    environment = run.environment
    if environment.get("dirty"):
        yield "Uncommitted changes.", f"Commit {environment.get('commit')} alone is not what ran."
    elif environment.get("dirty") is None:
        yield "Unknown state.", "Whether the tree was clean at its commit is not known."
    if "--quick" in str(environment.get("command", "")).split():
        yield "Quick run.", "Fewer samples than the full run, and slow providers left out."
    if ceilings_of(run) is None:
        yield "No ceilings.", "Bandwidth and GEMM rate were not measured, so no rooflines."
    noisy = [_words(run, r) for r in run.results if "rows" in r and disturbed(r)]
    if noisy:
        text = f"Others kept more than {QUIET:g} processors busy during {len(noisy)} of"
        yield "Disturbed.", f"{text} {len(run.results)} set-ups: {'; '.join(noisy)}."
    for result in run.results:
        if "error" in result:
            yield "Failed as a whole.", f"{_words(run, result)}: {result['error']}"
        elif not (mine := ours(result)) or not mine["ms"]:
            why = f"{mine['status']}: {mine['detail']}" if mine else "no provider of ours"
            yield "Ours was not timed.", f"{_words(run, result)}: {why}"


def _words(run: Run, result: Result) -> str:
    """The set-up in its suite, by what tells it from the others there."""
    return f"{result['suite']} {label(result, _shared(run, result['suite']))}"


def _shared(run: Run, suite: str) -> dict[str, Any]:
    return common([r for r in run.results if r["suite"] == suite])


def _not_timed(run: Run) -> Html:
    """Every provider that is missing or failed anywhere, by where and why."""
    places: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    totals: dict[str, int] = {}
    for result in run.results:
        totals[result["suite"]] = totals.get(result["suite"], 0) + 1
        for row in result.get("rows", []):
            if not row["ms"]:
                key = row["status"], row["name"], row["detail"]
                setups = places.setdefault(key, {}).setdefault(result["suite"], [])
                setups.append(label(result, _shared(run, result["suite"])))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (status, name, why), suites in places.items():
        told = [_where(suite, found, totals[suite]) for suite, found in suites.items()]
        groups.setdefault((status, "; ".join(told), why), []).append(name)
    lines = []
    # what failed first: it was to be had
    for (status, where, why), names in sorted(groups.items(), key=lambda one: one[0][0]):
        state = tag("span", status, class_="failed" if status == "failed" else "absent")
        lines.append(tag("span", state, " ", tag("strong", "; ".join(names)), f" ({where}): {why}"))
    return join([tag("h3", "Not timed"), items(lines, class_="small")]) if lines else Html("")


def _where(suite: str, setups: list[str], total: int) -> str:
    if len(setups) == total:
        return suite
    if len(setups) > 3:
        return f"{suite}, {len(setups)} of {total} set-ups"
    return f"{suite} {', '.join(setups)}"
