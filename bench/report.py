"""Results as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .environment import QUIET

_STYLE = {"ok": "", "failed": "red", "missing": "dim"}

Result = dict[str, Any]


def show(console: Console, result: Result, ceilings: dict[str, Any] | None = None) -> None:
    """All of a set-up. ceilings: what the device was seen to reach, where that was measured."""
    title = " ".join(f"{key}={value}" for key, value in result["params"].items())
    table = Table(title=f"[bold]{result['suite']}[/]  {title}", title_justify="left")
    table.add_column("provider", no_wrap=True)
    table.add_column("does", no_wrap=True)
    for heading in (f"ms {a(result['unit'])}", r"\[p20, p80]", "against ours", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("agreement with the reference")
    best = ours(result)
    for row in result["rows"]:
        table.add_row(*_cells(row, best), style=_STYLE[row["status"]])
    console.print(table)
    for line in conclusions(result, ceilings):
        console.print(line, highlight=False)
    console.print()


def a(unit: str) -> str:
    return {"image": "an image", "sequence": "a sequence"}[unit]


def ours(result: Result) -> dict[str, Any] | None:
    """The row of ours that the others are compared with: the first that was timed."""
    return next((row for row in result["rows"] if row["kind"] == "ours" and row["ms"]), None)


def rival(result: Result) -> dict[str, Any] | None:
    """The fastest rival's row."""
    timed = [row for row in result["rows"] if row["kind"] == "rival" and row["ms"]]
    return min(timed, key=lambda row: row["ms"]["median"], default=None)


def conclusions(result: Result, ceilings: dict[str, Any] | None = None) -> list[str]:
    lines = [", ".join(target(found) for found in result["targets"])]
    if result["workspace"]:
        lines.append(
            f"workspace of ours at its peak: {result['workspace']['ratio']:.2f}x"
            f" {result['workspace']['unit']} ({result['workspace']['bytes'] / 2**20:.1f} MiB)"
        )
    gigabytes, gigaflops = (
        result["cost"][unit] / 1e9 / result["images"] for unit in ("bytes", "flops")
    )
    lines.append(
        f"the work of {a(result['unit'])}: {1e3 * gigabytes:.2f} MB, {gigaflops:.3f} GFLOP unpruned"
    )
    if ceilings:
        lines.append(_floor(result, ceilings))
    if result["others_busy"] is not None:
        text = f"other processes kept {result['others_busy']:.2f} processors busy meanwhile"
        lines.append(f"[yellow]{text}: too much to judge[/]" if disturbed(result) else text)
    return [line for line in lines if line]


def disturbed(result: Result) -> bool:
    return (result["others_busy"] or 0.0) > QUIET


def floor_ms(cost: dict[str, int], images: int, ceilings: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds an image, for its bytes and for its products, at what the device reaches."""
    return (
        1e3 * cost["bytes"] / ceilings["copy_bytes_per_s"] / images,
        1e3 * cost["flops"] / ceilings["flops_per_s"] / images,
    )


def _floor(result: Result, ceilings: dict[str, Any]) -> str:
    moved, computed = floor_ms(result["cost"], result["images"], ceilings)
    unit = a(result["unit"])
    text = f"no faster than {moved:.2g} ms {unit} by its bytes, {computed:.2g} by its products"
    row = ours(result)
    if row is None:
        return text
    return f"{text}; ours takes {row['ms']['median'] / max(moved, computed):.1f}x that"


def headline(environment: dict[str, Any]) -> str:
    commit = environment["commit"] + (", uncommitted changes" if environment["dirty"] else "")
    if "gpu" in environment:
        gpu, versions = environment["gpu"], environment["versions"]
        return (
            f"{gpu['name']} (driver {gpu['driver']}), CUDA {gpu['cuda_of_torch']},"
            f" torch {versions['torch']}, triton {versions['triton']}, commit {commit}"
        )
    return (
        f"{environment['cpu']} ({environment['cpu_capability']}), {environment['threads']} threads,"
        f" torch {environment['versions']['torch']}, commit {commit}"
    )


def reached(ceilings: dict[str, Any]) -> str:
    return (
        f"copies {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, multiplies {ceilings['dtype']} at"
        f" {ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )


def _cells(row: dict[str, Any], against: dict[str, Any] | None) -> list[str]:
    names = escape(row["name"]), escape(row["scope"])
    if not row["ms"]:
        return [*names, row["status"], "", "", "", escape(row["detail"])]
    ratio = f"{row['ms']['median'] / against['ms']['median']:.2f}x" if against else ""
    spread = rf"\{span(row)}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
    detail = escape(row["detail"])
    if row["host_ms"] is not None:
        detail += f"; {row['host_ms']:.3f} ms of the host to launch a call"
    median = milliseconds(row["ms"]["median"])
    return [*names, median, spread, ratio, peak, detail]


def span(row: dict[str, Any]) -> str:
    low, high = (milliseconds(row["ms"][key]) for key in ("p20", "p80"))
    return f"[{low}, {high}]"


def milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def target(found: dict[str, Any]) -> str:
    names = {"rival": "fastest rival", "reference": "own reference", "floor": "the least work"}
    against = found.get("named") or names[found["against"]]
    if found.get("scope"):
        against += f" in {found['scope']}"
    bound = "at most " if found["against"] == "floor" else ""
    aim = f"target {bound}{found['factor']:g}x"
    if found["ratio"] is None:
        return f"ours vs {against}: not measured ({aim})"
    outcome = {True: "met", False: "missed", None: "not judged"}[found["met"]]
    who = f" ({found['provider']})" if found["against"] == "rival" else ""
    return f"ours vs {against}{who}: {found['ratio']:.2f}x ({aim}: {outcome})"


def summary(console: Console, results: list[Result]) -> None:
    """A table for each suite, a line for each set-up, and who is missing."""
    for suite in dict.fromkeys(result["suite"] for result in results):
        console.print(_suite([result for result in results if result["suite"] == suite]))
    for line in absent(results):
        console.print(line, highlight=False, markup=False)


def _suite(results: list[Result]) -> Table:
    told = varying([result["params"] for result in results])
    common = " ".join(f"{k}={v}" for k, v in results[0]["params"].items() if k not in told)
    table = Table(
        title=f"[bold]{results[0]['suite']}[/]  {common}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    unit = next((result["unit"] for result in results if "unit" in result), "image")
    table.add_column("set-up")
    for heading in (f"ours, ms {a(unit)}", r"\[p20, p80]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fastest rival")
    for heading in ("its ms", "ours is faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("aims")
    for result in results:
        setup = " ".join(f"{k}={v}" for k, v in result["params"].items() if k in told)
        table.add_row(setup or "usual", *_line(result))
    return table


def varying(params: list[dict[str, Any]]) -> list[str]:
    """The parameters that set-ups differ in."""
    names = dict.fromkeys(name for each in params for name in each)
    return [name for name in names if len({str(each.get(name)) for each in params}) > 1]


def _line(result: Result) -> list[str]:
    if "error" in result:
        return ["[red]failed[/]", "", escape(result["error"]), "", "", ""]
    own, other = ours(result), rival(result)
    cells = ["not timed", "", "none", "", ""]
    if own:
        cells[:2] = [milliseconds(own["ms"]["median"]), rf"\{span(own)}"]
    if other:
        cells[2:4] = [escape(other["name"]), milliseconds(other["ms"]["median"])]
    if own and other:
        cells[4] = _ratio(other["ms"]["median"] / own["ms"]["median"])
    marks = {True: "[green]met[/]", False: "[red]missed[/]", None: "not judged"}
    measured = [found for found in result["targets"] if found["ratio"] is not None]
    aims = dict.fromkeys(marks[found["met"]] for found in measured)
    note = ["[yellow]disturbed[/]"] if disturbed(result) else []
    return [*cells, ", ".join([*aims, *note])]


def _ratio(value: float) -> str:
    return f"[bold]{value:.2f}x[/]" if value >= 1 else f"[red]{value:.2f}x[/]"


def absent(results: list[Result]) -> list[str]:
    """Who was not timed, and why: a line for each reason."""
    who: dict[tuple[str, str], dict[str, None]] = {}
    where: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for row in result.get("rows", []):
            if row["status"] != "ok":
                why = row["status"], row["detail"]
                who.setdefault(why, {})[row["name"]] = None
                where.setdefault(why, {})[result["suite"]] = None
    return [
        f"{why[0]} in {', '.join(where[why])}: {'; '.join(names)}: {why[1]}"
        for why, names in who.items()
    ]
