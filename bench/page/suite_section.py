"""A suite's part of the report: charts of its set-ups and sweeps, rooflines, and every number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import charts, growth, roofline, sweeps
from .facts import (
    Result,
    Sweep,
    best_by_our_rule,
    binding,
    common,
    label,
    ours,
    per,
    share,
    where_it_stops,
)
from .html import Album, Column, Html, Line, items, join, table, tag
from .numbers import every_number, percent
from .style import Styles
from .words import listed, measured, memory, number, pairs


@dataclass(frozen=True)
class Suite:
    """As much as there is of it in a run."""

    name: str
    usual: list[Result]
    sweeps: list[Sweep]
    failed: list[Result]
    styles: Styles
    ceilings: dict[str, Any] | None

    def label(self, result: Result) -> str:
        return label(result, self.shared)

    @property
    def shared(self) -> dict[str, Any]:
        among = [*self.usual, *self.failed]
        return common(among) if among else {}


def section(suite: Suite, album: Album) -> Html:
    parts = [tag("h3", suite.name)]
    if suite.shared:
        several = len(suite.usual) + len(suite.failed) > 1
        every = "All usual set-ups" if several else "The usual set-up"
        parts.append(tag("p", f"{every}: {pairs(suite.shared)}", class_="note"))
    errors = [f"{suite.label(r)} failed as a whole: {r['error']}" for r in suite.failed]
    parts.append(items([tag("span", text, class_="failed") for text in errors]))
    if suite.usual:
        parts.append(tag("h4", "Usual set-ups"))
        parts.append(
            tag("div", join([_usual(suite, r, album) for r in suite.usual]), class_="grid")
        )
        if suite.name == "llava":
            parts += _first_tokens(suite, album)
    for sweep in suite.sweeps:
        parts += _sweep(suite, sweep, album)
    if suite.usual and suite.ceilings:
        parts += _roofline(suite, suite.ceilings, album)
    setups = [(suite.label(result), result) for result in [*suite.usual, *suite.failed]]
    for sweep in suite.sweeps:
        words = pairs(sweep.base)
        setups += [
            (f"{sweep.axis}={number(size)}, over {sweep.axis}: {words}", result)
            for size, result in zip(sweep.sizes, sweep.results, strict=True)
        ]
    parts.append(every_number(suite.name, setups, suite.ceilings))
    return tag("section", join(parts))


def _usual(suite: Suite, result: Result, album: Album) -> Html:
    name = suite.label(result)
    timed = sorted((r for r in result["rows"] if r["ms"]), key=lambda row: row["ms"]["median"])
    told = [f"{row['name']} {measured(row['ms']['median'])}" for row in timed]
    told += [f"{row['name']} {row['status']}" for row in result["rows"] if not row["ms"]]
    heard = f"{suite.name}, {name}: {per([result])}, fastest first: {'; '.join(told)}"
    figure = charts.usual(result, f"{suite.name}: {name}", suite.styles)
    return album.add(figure, f"{suite.name}-{name}", heard)


def _first_tokens(suite: Suite, album: Album) -> list[Html]:
    drawn = []
    for batch in dict.fromkeys(r["images"] for r in suite.usual):
        results = [r for r in suite.usual if r["images"] == batch]
        title = f"llava: time to first token, {batch} image{'s' if batch > 1 else ''}"
        told = [f"{r['params']['tokens']} tokens: {_medians(r, batch)}" for r in results]
        figure = charts.first_token(results, title, suite.styles)
        heard = f"{title}, in ms. {'; '.join(told)}"
        drawn.append(album.add(figure, f"llava-first-token-{batch}", heard))
    return [tag("h4", "Time to the first token"), tag("div", join(drawn), class_="grid")]


def _sweep(suite: Suite, sweep: Sweep, album: Album) -> list[Html]:
    sizes = [*sweep.sizes, *sweep.errors]
    name = f"{suite.name}-{sweep.axis}"
    parts = [
        tag("h4", f"Over {sweep.axis}, {number(min(sizes))} to {number(max(sizes))}"),
        tag("p", pairs(sweep.base), class_="note"),
        tag("p", tag("strong", "Where it stops paying: "), where_it_stops(sweep), "."),
    ]
    if sweep.results:
        stops = f"Where it stops paying: {where_it_stops(sweep)}"
        figures = [
            (sweeps.time(sweep, suite.name, suite.styles), "time", _ends(sweep)),
            (sweeps.against_best(sweep, suite.name), "speed-up", stops),
            (sweeps.peak(sweep, suite.name, suite.styles), "memory", _peaks(sweep)),
        ]
        drawn = [
            album.add(figure, f"{name}-{what}", f"{suite.name} over {sweep.axis}, {what}. {heard}")
            for figure, what, heard in figures
        ]
        parts += [tag("div", join(drawn), class_="grid"), _growth(sweep)]
    lines: list[Any] = [
        tag("span", f"{sweep.axis}={number(size)} failed as a whole: {error}", class_="failed")
        for size, error in sweep.errors.items()
    ]
    return [*parts, items([*lines, *_absent(sweep)], class_="small")]


def _ends(sweep: Sweep) -> str:
    result = sweep.results[-1]
    told = _medians(result, sweep.scale(result))
    return f"At {sweep.axis}={number(sweep.sizes[-1])}, {sweep.unit}: {told}"


def _medians(result: Result, scale: float) -> str:
    timed = [row for row in result["rows"] if row["ms"]]
    return "; ".join(f"{row['name']} {measured(row['ms']['median'] * scale)}" for row in timed)


def _peaks(sweep: Sweep) -> str:
    rows = [row for row in sweep.results[-1]["rows"] if row.get("peak_bytes")]
    told = [f"{row['name']} {memory(row['peak_bytes'])}" for row in rows]
    return f"At {sweep.axis}={number(sweep.sizes[-1])}: {'; '.join(told) or 'none known'}"


def _absent(sweep: Sweep) -> list[str]:
    """Who has no point at which sizes, and why."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for (_, name), rows in sweep.rows().items():
        for size, _, row in rows:
            if not row["ms"]:
                found.setdefault((name, row["status"], row["detail"]), []).append(size)
            elif not row.get("peak_bytes"):
                why = "holds nothing" if row.get("peak_bytes") == 0 else "not seen by torch"
                found.setdefault((name, "no peak memory", why), []).append(size)
    groups: dict[str, list[str]] = {}
    for (name, status, why), sizes in found.items():
        groups.setdefault(f"{status} {_at(sweep, sizes)}: {why}", []).append(name)
    return [f"{'; '.join(names)}, {text}" for text, names in groups.items()]


def _at(sweep: Sweep, sizes: list[float]) -> str:
    if len(sizes) == len(sweep.sizes):
        return "at every size"
    return f"at {sweep.axis} = {listed(sizes)}"


def _growth(sweep: Sweep) -> Html:
    """Exponents of every provider's time, and of the counted work to hold them against."""
    series = {
        name: [(size, row["ms"]["median"] * sweep.scale(r)) for size, r, row in rows if row["ms"]]
        for (_, name), rows in sweep.rows().items()
    }
    work = [r["cost"]["flops"] * sweep.scale(r) / r["images"] for r in sweep.results]
    series["the counted FLOPs"] = list(zip(sweep.sizes, work, strict=True))
    mine = ours(sweep.results[0])
    lines = [
        Line([name, *_fits(points, sweep)], "mine" if mine and name == mine["name"] else "")
        for name, points in series.items()
        if points
    ]
    columns = [Column("provider"), Column("all its sizes", "num"), Column("the largest", "num")]
    return table(columns, lines, f"Time as a power of {sweep.axis}, ± the fit's standard error")


def _fits(points: list[tuple[float, float]], sweep: Sweep) -> Iterator[Html]:
    points = [(size, cost) for size, cost in points if cost > 0]
    sizes, costs = [size for size, _ in points], [cost for _, cost in points]
    for fitted in (growth.fit(sizes, costs), growth.fit_largest(sizes, costs)):
        if fitted is None:
            yield tag("span", "too few sizes", class_="absent")
            continue
        power, _, error = str(fitted).partition(" ")
        span = f" {number(fitted.smallest)} to {number(fitted.largest)}"
        yield tag(
            "span", sweep.axis, tag("sup", power), f" {error}", tag("span", span, class_="absent")
        )


def _roofline(suite: Suite, ceilings: dict[str, Any], album: Album) -> list[Html]:
    figure = roofline.roofline(suite.name, suite.usual, ceilings, suite.styles)
    lines, told = [], []
    for i, result in enumerate(suite.usual, 1):
        mine, rival = ours(result), best_by_our_rule(result)
        shares = [share(result, row, ceilings) if row else None for row in (mine, rival)]
        cost = result["cost"]
        density = measured(cost["flops"] / cost["bytes"]) if cost["bytes"] else ""
        name = f"{i}: {suite.label(result)}"
        bound = binding(result, ceilings)
        lines.append(Line([name, percent(shares[0]), percent(shares[1]), bound, density]))
        told.append(f"{name}, ours {percent(shares[0]) or 'not timed'} of the {bound}")
    columns = [
        Column("set-up"),
        Column("ours", "num"),
        Column("best rival", "num"),
        Column("of the"),
        Column("FLOPs a byte", "num"),
    ]
    dtypes = {r["params"].get("dtype", ceilings["dtype"]) for r in suite.usual}
    other = sorted(dtypes - {ceilings["dtype"]})
    note = (
        "Bytes and FLOPs are counted from the definition: everything read and written once, no"
        " product skipped. A share above 100% means data in caches, or work that was skipped."
        " Rivals that go by their own rule do other work and are left out here."
    )
    if other:
        note += f" The ceilings are of {ceilings['dtype']}, some set-ups of {', '.join(other)}."
    return [
        tag("h4", "What of the machine is reached"),
        tag("p", note, class_="note"),
        tag(
            "div",
            album.add(figure, f"{suite.name}-roofline", f"Roofline. {'; '.join(told)}"),
            table(columns, lines, f"{suite.name}: achieved share of the ceiling"),
            class_="beside",
        ),
    ]
