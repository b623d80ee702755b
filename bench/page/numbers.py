"""The table of every number of a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .facts import UNMODIFIED, Result, Row, disturbed, ours, per, ratio, share
from .html import Column, Html, Line, table, tag
from .words import measured, times


@dataclass(frozen=True)
class Number:
    """A column: what a timed row has in it, empty where it has none."""

    column: Column
    of: Callable[[Result, Row], str]


def every_number(
    name: str, results: list[tuple[str, Result]], ceilings: dict[str, Any] | None
) -> Html:
    """results: (set-up in words, its result). Closed until one asks for it."""
    numbers = list(_numbers([result for _, result in results], ceilings))
    columns = [
        Column("provider"),
        *(number_.column for number_ in numbers),
        Column("does", "mid"),
        Column("agreement with the reference, or why it was not timed", "long"),
    ]
    lines = []
    for words, result in results:
        if disturbed(result):
            words += f" (disturbed: others kept {result['others_busy']:.2f} processors busy)"
        lines.append(Line([words], group=True))
        if "error" in result:
            why = tag("span", result["error"], class_="failed")
            blank = [""] * (len(columns) - 2)
            lines.append(Line(["failed as a whole", *blank, why]))
            continue
        lines += [_line(row, result, numbers) for row in result["rows"]]
    caption = f"{name}: times in {per([r for _, r in results if 'rows' in r])}"
    count = f"{len(results)} set-up{'s' if len(results) > 1 else ''}"
    return tag(
        "details",
        tag("summary", f"Every number of {name} ({count})"),
        table(columns, lines, caption),
        class_="numbers",
    )


def _line(row: Row, result: Result, numbers: list[Number]) -> Line:
    if row["ms"]:
        cells: list[Any] = [number_.of(result, row) for number_ in numbers]
    else:
        class_ = "failed" if row["status"] == "failed" else "absent"
        cells = [tag("span", row["status"], class_=class_), *[""] * (len(numbers) - 1)]
    class_ = "mine" if row is ours(result) else ""
    return Line([row["name"], *cells, row["scope"], row["detail"]], class_)


def _numbers(results: list[Result], ceilings: dict[str, Any] | None) -> Iterator[Number]:
    rows = [row for result in results for row in result.get("rows", [])]

    def column(name: str, of: Callable[[Result, Row], str]) -> Number:
        return Number(Column(name, "num"), of)

    yield column("median", lambda _, row: measured(row["ms"]["median"]))
    yield column("p20", lambda _, row: measured(row["ms"]["p20"]))
    yield column("p80", lambda _, row: measured(row["ms"]["p80"]))
    yield column("samples", lambda _, row: str(len(row["samples_ms"])))
    yield column("against ours", _against)
    if any(result.get("facts") for result in results):
        yield from _of_a_model(column)
    if ceilings:
        yield column("of the ceiling", lambda result, row: percent(share(result, row, ceilings)))
    if any(row.get("host_ms") is not None for row in rows):
        yield column("host, ms a call", lambda _, row: _known(row.get("host_ms"), measured))
    if any(row.get("peak_bytes") is not None for row in rows):
        yield column("peak, MiB", lambda _, row: _known(row.get("peak_bytes"), _mebibytes))


def _of_a_model(column: Callable[..., Number]) -> Iterator[Number]:
    """What there is to say of a whole model's answer besides the time to its first token."""

    def fact(name: str, key: str, text: Callable[[Any], str]) -> Number:
        def of(result: Result, row: Row) -> str:
            return _known(
                result.get("facts", {}).get("rows", {}).get(row["name"], {}).get(key), text
            )

        return column(name, of)

    def tokens(result: Result, row: Row) -> str:
        return str(result["params"]["of" if row["name"] == UNMODIFIED else "tokens"])

    yield column("visual tokens", tokens)
    yield column("first token, ms", lambda r, row: measured(row["ms"]["median"] * r["images"]))
    yield fact("tokens/s", "tokens_per_second", measured)
    yield fact("cache, MiB", "cache_bytes", _mebibytes)
    yield fact("peak with the cache, MiB", "peak_bytes", _mebibytes)
    yield fact("above as many tokens", "over_least", _spread_percent)
    yield fact("operators, ms", "operators_ms", lambda ms: measured(ms["median"]))


def _against(result: Result, row: Row) -> str:
    mine = ours(result)
    if mine is None or not mine["ms"] or row is mine:
        return ""
    return times(ratio(mine, row).median)


def _known(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None else text(value)


def _mebibytes(count: float) -> str:
    return measured(count / 2**20)


def _spread_percent(share_: dict[str, float]) -> str:
    # no minus before a zero
    median, low, high = (f"{round(share_[of], 3) + 0.0:.1%}" for of in ("median", "p20", "p80"))
    return f"{median} [{low}, {high}]"


def percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"
