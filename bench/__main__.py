"""``python -m bench``: check every provider, time those that agree, print tables, keep the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import bench_merge_tokens, bench_token_importance, environment, report, runner

# each has SETUPS, and case(setup), which makes the data and the expected result
SUITES = {"merge_tokens": bench_merge_tokens, "token_importance": bench_token_importance}


def main(
    suites: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(SUITES)}")] = None,
    only: Annotated[str, typer.Option(help="of the set-ups, those with this text: D=1024")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="few repetitions")] = False,
    threads: Annotated[int, typer.Option(min=1, help="for every provider")] = 2,
    keep: Annotated[bool, typer.Option("--json", help="write JSON into bench/results")] = False,
    out: Annotated[Path | None, typer.Option(help="write JSON into this file")] = None,
) -> None:
    """Time the operators against their rivals on this machine."""
    unknown = set(suites or []) - set(SUITES)
    if unknown:
        raise typer.BadParameter(f"suites are {', '.join(SUITES)}, got {', '.join(unknown)}")
    repetitions, seconds = (7, 2.0) if quick else (41, 20.0)
    console = Console()
    if not console.is_terminal:
        # a file has no width of its own
        console.width = 140

    environment.limit_threads(threads)
    described = environment.describe(threads)
    console.print(report.headline(described), "\n", highlight=False)
    results = []
    for name in suites or SUITES:
        for setup in SUITES[name].SETUPS:
            if only not in str(setup):
                continue
            with console.status(f"{name} {setup}"):
                case = SUITES[name].case(setup)
                result = runner.run_case(case, repetitions=repetitions, seconds=seconds)
            report.show(console, result)
            results.append(result)

    path = out or (environment.result_path(described) if keep else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": described, "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="python -m bench")
