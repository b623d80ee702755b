"""Results as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .runner import Result, Row

_STYLE = {"ok": "", "failed": "red", "missing": "dim"}


def show(console: Console, result: Result, ceilings: dict[str, float] | None = None) -> None:
    """ceilings: what the device was seen to reach, where that was measured."""
    title = " ".join(f"{key}={value}" for key, value in result.params.items())
    table = Table(title=f"[bold]{result.suite}[/]  {title}", title_justify="left")
    table.add_column("provider", no_wrap=True)
    table.add_column("does", no_wrap=True)
    for heading in ("ms per image", "[p20, p80]", "against ours"):
        table.add_column(heading.replace("[", r"\["), justify="right", no_wrap=True)
    table.add_column("agreement with the reference")
    ours = next((row.ms["median"] for row in result.rows if row.kind == "ours" and row.ms), None)
    for row in result.rows:
        table.add_row(*_cells(row, ours), style=_STYLE[row.status])
    console.print(table)
    for line in conclusions(result, ceilings):
        console.print(line, highlight=False)
    console.print()


def conclusions(result: Result, ceilings: dict[str, float] | None = None) -> list[str]:
    lines = [", ".join(_target(target) for target in result.targets)]
    if result.workspace:
        lines.append(
            f"workspace of ours at its peak: {result.workspace['ratio']:.2f}x"
            f" {result.workspace['unit']} ({result.workspace['bytes'] / 2**20:.1f} MiB)"
        )
    gigabytes, gigaflops = (result.cost[unit] / 1e9 / result.images for unit in ("bytes", "flops"))
    lines.append(f"the work of an image: {1e3 * gigabytes:.2f} MB, {gigaflops:.3f} GFLOP unpruned")
    if ceilings:
        lines.append(_floor(result, ceilings))
    if result.others_busy is not None:
        text = f"other processes kept {result.others_busy:.2f} processors busy meanwhile"
        lines.append(f"[yellow]{text}: too much to judge[/]" if result.disturbed else text)
    return lines


def floor_ms(cost: dict[str, int], images: int, ceilings: dict[str, float]) -> tuple[float, float]:
    """Milliseconds an image, for its bytes and for its products, at what the device reaches."""
    return (
        1e3 * cost["bytes"] / ceilings["copy_bytes_per_s"] / images,
        1e3 * cost["flops"] / ceilings["bfloat16_flops_per_s"] / images,
    )


def _floor(result: Result, ceilings: dict[str, float]) -> str:
    moved, computed = floor_ms(result.cost, result.images, ceilings)
    text = f"no faster than {moved:.2g} ms an image by its bytes, {computed:.2g} by its products"
    times = [row.ms["median"] for row in result.rows if row.kind == "ours" and row.ms]
    return f"{text}; ours takes {times[0] / max(moved, computed):.1f}x that" if times else text


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


def _cells(row: Row, ours: float | None) -> list[str]:
    if not row.ms:
        return [row.name, row.scope, row.status, "", "", row.detail]
    ratio = f"{row.ms['median'] / ours:.2f}x" if ours else ""
    low, high = (milliseconds(row.ms[key]) for key in ("p20", "p80"))
    spread = rf"\[{low}, {high}]"
    detail = row.detail
    if row.host_ms is not None:
        detail += f"; {row.host_ms:.3f} ms of the host to launch a call"
    return [row.name, row.scope, milliseconds(row.ms["median"]), spread, ratio, detail]


def milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _target(target: dict[str, Any]) -> str:
    names = {"rival": "fastest rival", "reference": "own reference", "floor": "the least work"}
    against = target.get("named") or names[target["against"]]
    bound = "at most " if target["against"] == "floor" else ""
    aim = f"target {bound}{target['factor']:g}x"
    if target["ratio"] is None:
        return f"ours vs {against}: not measured ({aim})"
    outcome = {True: "met", False: "missed", None: "not judged"}[target["met"]]
    who = f" ({target['provider']})" if target["against"] == "rival" else ""
    return f"ours vs {against}{who}: {target['ratio']:.2f}x ({aim}: {outcome})"
