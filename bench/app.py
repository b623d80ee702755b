"""``vmtc bench``, ``python -m bench``: check every provider, time who agrees, say who won."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .options import Options


class _Runs(TyperGroup):
    """Without the name of a command, run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Runs,
    help="Time the operators against their rivals. Without a command: run, of which"
    " `run --help` tells the options.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="importance, kmeans, merge, focus, decode, llava; else all"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few samples, three minutes")] = False,
    sweeps: Annotated[
        bool, typer.Option("--sweeps", help="also over each size: tokens, images, ...")
    ] = False,
    usual: Annotated[bool, typer.Option(help="the usual set-ups")] = True,
    only: Annotated[str, typer.Option(help="of the set-ups, those with this text: D=1024")] = "",
    device: Annotated[
        str, typer.Option(help="cpu or cuda, the current GPU", show_default="cuda if there is one")
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="of every provider", show_default="as many as torch takes"),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="on a GPU call by call, and not by CUDA graphs")
    ] = False,
    size: Annotated[
        str,
        typer.Option(
            help="of the model of llava: 7b, small or tiny",
            show_default="7b on a GPU, else small, quick tiny",
        ),
    ] = "",
    keep: Annotated[bool, typer.Option("--json", help="write JSON into bench/results")] = False,
    out: Annotated[
        Path | None, typer.Option(help="write JSON into this file, or into this folder")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="a table of each set-up")] = False,
) -> None:
    """Time the operators against their rivals on this machine."""
    import torch

    from . import report
    from .environment import CHECKOUT
    from .record import write

    if keep and not CHECKOUT:
        raise typer.BadParameter("--json is for a checkout of the project: give --out")
    try:
        options = Options(
            tuple(suites or ()), quick, sweeps, usual, only, device, threads or 0, eager, size
        ).checked()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    planned = options.plan()
    console = Console()
    if not console.is_terminal:
        # a file has no width of its own
        console.width = 140
    meter = options.meter()
    described = options.describe(meter)
    console.print(report.headline(described), highlight=False)
    console.print(report.reached(described["ceilings"]), "\n", highlight=False)
    path = _path(described, keep, out)
    results: list[dict[str, Any]] = []
    with _progress(console, len(planned)) as notify, _interrupted(console):
        for i, each in enumerate(planned):
            results.append(_result(each, options, meter, lambda *at, i=i: notify(i, *at)))
            if details and "rows" in results[-1]:
                report.show(console, results[-1], described["ceilings"])
            if path:
                # after each set-up: what a run that is cut short has measured is kept
                write(path, described, results)
            if options.device == "cuda":
                # the graphs of this set-up hold memory that the next one may need
                gc.collect()
                torch.cuda.empty_cache()
    report.summary(console, results)
    if path:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    failed = [row for record in results for row in record.get("rows", []) if _is_wrong(row)]
    if failed or len(results) < len(planned) or any("error" in record for record in results):
        raise typer.Exit(1)


def _path(described: dict[str, Any], keep: bool, out: Path | None) -> Path | None:
    from .environment import ROOT, result_name

    if out is None and keep:
        out = ROOT / "bench" / "results"
    if out is None or out.suffix == ".json":
        return out
    return out / result_name(described)


def _result(each: Any, options: Options, meter: Any, notify: Any) -> dict[str, Any]:
    """What was measured, or why nothing was: one set-up may not fit."""
    from .environment import gpu_state

    try:
        found = asdict(
            each.run(options.effort(each), meter, lambda done, what: notify(done, each, what))
        )
    except Exception as error:
        found = each.failed(error)
    if options.device == "cuda":
        found["gpu_state"] = gpu_state()
    return found


@contextmanager
def _progress(console: Console, count: int) -> Iterator[Any]:
    """A bar over all set-ups; in a file, a line when one begins."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TaskProgressColumn(), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    begun = set()
    with Progress(*columns, text, console=console, transient=True) as progress:
        task = progress.add_task("", total=count)

        def notify(i: int, done: float, each: Any, what: str) -> None:
            if console.is_terminal:
                width = max(10, console.width - 60)
                described = f"{each.suite.name} {i + 1}/{count}: {what}"[:width]
                progress.update(task, completed=i + done, description=described)
            elif i not in begun:
                begun.add(i)
                console.print(f"{i + 1}/{count} {each.label}", highlight=False, soft_wrap=True)

        yield notify


@contextmanager
def _interrupted(console: Console) -> Iterator[None]:
    """Who stops a run still sees what it has measured."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/]")


def _is_wrong(row: dict[str, Any]) -> bool:
    return row["kind"] == "ours" and row["status"] == "failed"


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="with the JSON files of runs")],
    out: Annotated[
        Path | None, typer.Option(help="folder for the page", show_default="the same")
    ] = None,
) -> None:
    """Draw the runs of a folder: report.html, complete in itself, and PNGs."""
    from . import page

    try:
        typer.echo(page.main(folder, out))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of a run")],
    after: Annotated[Path, typer.Argument(help="JSON of another")],
    every: Annotated[bool, typer.Option("--all", help="also what did not move")] = False,
) -> None:
    """Say what became slower beyond the spread of both runs; then the exit status is 1."""
    from . import compare as comparison

    try:
        raise typer.Exit(comparison.main(before, after, Console(), every=every))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
