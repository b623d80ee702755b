"""``python -m bench``: check every provider, time those that agree, print tables, keep the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import (
    bench_focus_attention,
    bench_llava,
    bench_merge_tokens,
    bench_token_importance,
    environment,
    gpu_focus_attention,
    gpu_kmeans,
    gpu_merge_tokens,
    gpu_sweep,
    gpu_timing,
    gpu_token_importance,
    report,
    runner,
)

# each has SETUPS, and case(setup), which makes the data and the expected result
SUITES: dict[str, dict[str, ModuleType]] = {
    "cpu": {
        "merge_tokens": bench_merge_tokens,
        "token_importance": bench_token_importance,
        "focus_attention": bench_focus_attention,
    },
    "cuda": {
        "merge_tokens": gpu_merge_tokens,
        "token_importance": gpu_token_importance,
        "focus_attention": gpu_focus_attention,
        "kmeans": gpu_kmeans,
        "sweep": gpu_sweep,
    },
}
# repetitions, and seconds at most for each provider
EFFORT = {("cpu", False): (41, 20.0), ("cpu", True): (7, 2.0)}
EFFORT |= {("cuda", False): (41, 2.0), ("cuda", True): (15, 0.2)}


def main(
    suites: Annotated[
        list[str] | None, typer.Argument(help="all but llava, a whole model, if none is named")
    ] = None,
    only: Annotated[str, typer.Option(help="of the set-ups, those with this text: D=1024")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="few repetitions")] = False,
    threads: Annotated[int, typer.Option(min=1, help="for every provider")] = 2,
    keep: Annotated[bool, typer.Option("--json", help="write JSON into bench/results")] = False,
    out: Annotated[Path | None, typer.Option(help="write JSON into this file")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, the current GPU")] = "cpu",
    size: Annotated[
        str, typer.Option(help="of llava: 7b (on a GPU the usual), small (on a CPU) or tiny")
    ] = "",
) -> None:
    """Time the operators against their rivals on this machine."""
    if device not in SUITES:
        raise typer.BadParameter(f"devices are {', '.join(SUITES)}, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device")
    if size and size not in bench_llava.SIZES:
        raise typer.BadParameter(f"sizes are {', '.join(bench_llava.SIZES)}, got {size}")
    available: dict[str, Any] = {"llava": bench_llava.Suite(device, size), **SUITES[device]}
    unknown = set(suites or []) - set(available)
    if unknown:
        raise typer.BadParameter(f"suites are {', '.join(available)}, got {', '.join(unknown)}")
    console = Console()
    if not console.is_terminal:
        # a file has no width of its own
        console.width = 140

    meter = _meter(device, threads)
    described = environment.describe(threads, device)
    console.print(report.headline(described), "\n", highlight=False)
    ceilings = described["ceilings"] = gpu_timing.ceilings() if device == "cuda" else None
    path = out or (environment.result_path(described) if keep else None)
    results: list[dict[str, Any]] = []
    for name in suites or SUITES[device]:
        for setup in available[name].SETUPS:
            if only not in str(setup):
                continue
            with console.status(f"{name} {setup}"):
                result = _result(available[name], setup, device, meter, quick)
            if isinstance(result, str):
                console.print(f"{name} {setup}: {result}", markup=False, style="red")
                record = {"suite": name, "params": asdict(setup), "error": result}
            else:
                report.show(console, result, ceilings)
                record = asdict(result)
            if device == "cuda":
                record["gpu_state"] = environment.gpu_state()
            results.append(record)
            if path:
                # after each case: what a run that is cut short has measured is kept
                _write(path, {"environment": described, "results": results})
            if device == "cuda":
                # the graphs of this case hold memory that the next one may need
                torch.cuda.empty_cache()
    if path:
        console.print(f"wrote {path}", highlight=False)
    failed = [row for record in results for row in record.get("rows", []) if _is_wrong(row)]
    if failed or any("error" in record for record in results):
        raise typer.Exit(1)


def _result(
    suite: ModuleType | bench_llava.Suite, setup: Any, device: str, meter: runner.Meter, quick: bool
) -> runner.Result | str:
    """What was measured, or on a GPU, where one set-up may not fit, why nothing was."""
    repetitions, seconds = EFFORT[device, quick]
    try:
        if isinstance(suite, bench_llava.Suite):
            return suite.run(setup, quick)
        return runner.run_case(
            suite.case(setup), repetitions=repetitions, seconds=seconds, meter=meter, quick=quick
        )
    except Exception as error:
        if device == "cpu":
            raise
        return runner.short(error)


def _write(path: Path, whole: dict[str, Any]) -> None:
    """All at once: who is stopped while writing leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(whole, indent=1) + "\n")
    new.replace(path)


def _is_wrong(row: dict[str, Any]) -> bool:
    return row["kind"] == "ours" and row["status"] == "failed"


def _meter(device: str, threads: int) -> runner.Meter:
    if device == "cpu":
        environment.limit_threads(threads)
        return runner.CPU
    return gpu_timing.GpuMeter()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="python -m bench")
