"""Who won: a line for every usual set-up, also where it was not ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..record import Run
from .facts import (
    Ratio,
    Result,
    Row,
    best,
    best_by_our_rule,
    common,
    disturbed,
    label,
    ours,
    per,
    speedup,
    split,
    where_it_stops,
)
from .html import Column, Html, Line, items, join, table, tag
from .words import measured, times

# what a target is held against
_AGAINST = {"rival": "best rival", "reference": "own reference", "floor": "floor"}


def verdicts(run: Run) -> Iterator[Html]:
    lines: list[Line] = []
    counts = {"faster": 0, "slower": 0, "even": 0, "disturbed": 0, "unknown": 0}
    lost: dict[tuple[str, str], list[float]] = {}
    for suite, (usual, _, failed) in split(run).items():
        shared = common([*usual, *failed]) if usual or failed else {}
        for result in [*usual, *failed]:
            won = speedup(result) if "rows" in result else None
            rival = best(result) if won else None
            state = _state_of(result, won)
            counts[state] += 1
            if won and rival and state == "slower":
                lost.setdefault((suite, rival["name"]), []).append(won.median)
            lines.append(_verdict(suite, label(result, shared), result, won))
    if lines:
        yield tag("h3", "Ours against the best rival")
        yield tag("p", _sum(counts), class_="verdict")
        if lost:
            told = "; ".join(_lost(*key, ratios) for key, ratios in lost.items())
            yield tag("p", tag("span", "Slower: ", class_="slower"), told, ".")
        columns = [
            Column("set-up"),
            Column("ours is", "state"),
            Column("best rival", "mid"),
            Column("targets", "mid"),
        ]
        yield table(
            columns,
            lines,
            "Usual set-ups; ratio of medians, range by the 20th and 80th percentiles of both sides",
        )
    stops = [
        tag("span", tag("strong", f"{suite} over {sweep.axis}: "), where_it_stops(sweep))
        for suite, (_, sweeps, _) in split(run).items()
        for sweep in sweeps
    ]
    if stops:
        yield join([tag("h4" if lines else "h3", "Where it stops paying"), items(stops)])


def _state_of(result: Result, won: Ratio | None) -> str:
    if won is None:
        return "unknown"
    return "disturbed" if disturbed(result) else won.verdict


def _lost(suite: str, rival: str, ratios: list[float]) -> str:
    low, high = times(min(ratios)), times(max(ratios))
    count = f" in {len(ratios)} set-ups" if len(ratios) > 1 else ""
    return f"{suite}{count}, {low if low == high else f'{low} to {high}'} of {rival}"


def _sum(counts: dict[str, int]) -> Html:
    total = sum(counts.values())
    words = {
        "faster": "faster",
        "slower": "slower",
        "even": "within the spread of the two",
        "disturbed": "disturbed and not judged",
        "unknown": "not compared",
    }
    told = [
        tag("span", f"{counts[key]} {text}", class_=key)
        for key, text in words.items()
        if counts[key]
    ]
    parts = [part for one in told for part in (", ", one)][1:]
    return tag("span", f"Of {total} usual set-ups against the best rival of each: ", *parts, ".")


def _verdict(suite: str, name: str, result: Result, won: Ratio | None) -> Line:
    head = join([tag("strong", suite), tag("span", name, class_="sub")])
    if "error" in result:
        why = tag("span", result["error"], class_="sub")
        return Line([head, join([_state("unknown", "failed as a whole"), why]), "", ""], "lost")
    mine, rival = ours(result), best(result)
    state = _state_of(result, won)
    if won:
        text = f"{won} faster" if state == "faster" else f"{won}, {state}"
        span = tag("span", f"{times(won.low)} to {times(won.high)}", class_="sub")
        cell = join([_state(state, text), span])
    elif mine and mine["ms"]:
        cell = _state("unknown", "no rival was timed")
    else:
        cell = _state("slower", f"not timed: {mine['status'] if mine else 'nothing of ours'}")
    against: Any = "none"
    if rival:
        scope = "" if rival["scope"] == "everything" else rival["scope"]
        both = measured(rival["ms"]["median"])
        if mine and mine["ms"]:
            both += f" against {measured(mine['ms']['median'])}"
        sub = f"{both} {per([result])}" + (f"; {scope}" if scope else "")
        against = join([rival["name"], tag("span", sub, class_="sub"), _by_our_rule(result, rival)])
    lost = not (mine and mine["ms"]) or state == "slower"
    targets = join([_target(target) for target in result["targets"]])
    return Line([head, cell, against, targets], "lost" if lost else "")


def _by_our_rule(result: Result, rival: Row) -> Html:
    """Whom ours is held against besides a method that comes to another result."""
    other = best_by_our_rule(result)
    won = speedup(result, best_by_our_rule)
    if other is rival or other is None or won is None:
        return Html("")
    text = f"not by its own rule: {other['name']}, {won} ({times(won.low)} to {times(won.high)})"
    return tag("span", text, class_="sub")


def _state(class_: str, text: str) -> Html:
    return tag("span", text, class_=class_)


def _target(target: dict[str, Any]) -> Html:
    floor = target["against"] == "floor"
    against = target.get("named") or _AGAINST[target["against"]]
    if target.get("scope"):
        against += f", {target['scope']}"
    aim = f"{'at most' if floor else 'at least'} {target['factor']:g}x {against}: "
    if target["ratio"] is None:
        outcome, class_ = "not measured", "unknown"
    else:
        word, class_ = {True: ("met", "faster"), False: ("missed", "slower")}.get(
            target["met"], ("not judged", "unknown")
        )
        outcome = f"{times(target['ratio'])}, {word}"
    return tag("div", aim, tag("span", outcome, class_=class_))
