"""``python -m bench.aot``: compile every kernel for every GPU without one, and look at the code.

The Triton kernels in the variants that the launchers ask for in the calls of aot_calls.py; the CUDA
C++ kernels in every instance that csrc/cuda/*.cu has. Nothing is run: no number here is a time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import aot_calls, aot_code

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
# of nvcc: what setup.py builds
GPUS = ("75", "80", "90a", "100")
# what nvcc made, by the hash of everything that it was made of
CACHE = ROOT / "build" / "aot"
FLAGS = ("-cubin", "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}")

Work = tuple[Callable[..., list[dict[str, Any]]], tuple[Any, ...]]


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_triton(variant: aot_calls.Variant, source: aot_calls.Source) -> list[dict[str, Any]]:
    row: dict[str, Any] = {
        "kernel": variant.kernel,
        "arch": str(variant.arch),
        "arguments": dict(variant.arguments),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
    }
    parts = (source.function, source.signature, source.constexprs, source.attributes)
    try:
        target = GPUTarget("cuda", variant.arch, 32)
        made = triton.compile(ASTSource(*parts), target=target, options=source.options)
    except Exception as error:
        return [row | {"error": f"{type(error).__name__}: {error}"}]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        (found,) = aot_code.inspect(cubin).values()
    return [row | found | {"dynamic_shared_bytes": made.metadata.shared}]


def compile_cuda(source: Path, gpu: str) -> list[dict[str, Any]]:
    compiler = nvcc()
    assert compiler
    flags = [*FLAGS, f"-arch=sm_{gpu}"]
    made_of = [path.read_bytes() for path in (source, *sorted(CUDA.glob("*.*h")))]
    said = f"{flags} {subprocess.run([compiler, '--version'], capture_output=True).stdout!r}"
    key = hashlib.sha256(b"\0".join([said.encode(), *made_of])).hexdigest()[:16]
    cubin = CACHE / f"{source.stem}-{gpu}-{key}.cubin"
    if not cubin.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, "-o", str(partial), str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            error = (run.stderr or run.stdout).strip()[:2000]
            return [{"kernel": source.stem, "file": source.name, "arch": gpu, "error": error}]
        partial.rename(cubin)
    found = aot_code.inspect(cubin)
    names = aot_code.readable(list(found))
    # what a block asks for at run time is not in the file
    return [
        {"kernel": names[name], "file": source.name, "arch": gpu, **values}
        for name, values in found.items()
    ]


# looked up by the processes that are forked from this one: a kernel cannot be sent to them
_work: list[Work] = []


def _do_numbered(i: int) -> list[dict[str, Any]]:
    function, arguments = _work[i]
    return function(*arguments)


def collect(
    archs: Iterable[int], gpus: Iterable[str], only: str = "", quick: bool = False, jobs: int = 2
) -> dict[str, Any]:
    """Everything that the JSON holds. only: of the kernels, those with this text in their name.

    quick: of the Triton kernels what typical calls ask for; which those are is told of all calls.
    """
    variants: dict[aot_calls.Variant, aot_calls.Source] = {}
    numbers: dict[aot_calls.Variant, int] = {}
    recorded = []
    for call in aot_calls.calls():
        for arch in archs:
            found = {v: s for v, s in aot_calls.record(call, arch).items() if only in v.kernel}
            if call.typical or not quick:
                variants |= found
            ids = sorted(numbers.setdefault(variant, len(numbers)) for variant in found)
            what = {"op": call.op, "kind": call.kind, "sizes": call.sizes, "arch": str(arch)}
            recorded.append({**what, "variants": ids})
    sources = sorted(CUDA.glob("*.cu")) if nvcc() else []
    # those that take longest first, or one process would be left with them at the end
    _work[:] = [(compile_cuda, (source, gpu)) for source in sources for gpu in gpus]
    in_file = len(_work)
    _work.extend((compile_triton, item) for item in variants.items())
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        rows = pool.map(_do_numbered, range(len(_work)), chunksize=1)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("COMMIT"),
        "dirty": bool(_git("status", "--porcelain")),
        "tools": {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "ptxas": aot_code.version(aot_code.TOOLS / "ptxas"),
            "cuobjdump": aot_code.version(aot_code.TOOLS / "cuobjdump"),
            "nvcc": aot_code.version(nvcc() or "nvcc"),
        },
        "missing": None if nvcc() else "nvcc is neither on PATH nor in /usr/local/cuda/bin",
        "kernels": sorted(aot_calls.kernels()),
        "calls": recorded,
        "variants": [str(variant) for variant in numbers],
        "triton": [row for found in rows[in_file:] for row in found],
        "cuda": [row for found in rows[:in_file] for row in found if only in row["kernel"]],
    }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for heading in ("kernel", "sm"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("variants", "registers", "stack", "spilled", "shared KB", "code KB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("tensor cores", "global memory"):
        shown.add_column(heading)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"].partition("<")[0], row["arch"]), []).append(row)
    for (kernel, arch), all_of in sorted(groups.items()):
        group = [row for row in all_of if "error" not in row]
        if len(group) < len(all_of):
            failed = next(row["error"] for row in all_of if "error" in row)
            count = f"{len(all_of) - len(group)} of {len(all_of)}"
            shown.add_row(kernel, arch, count, "do not compile: " + failed, style="red")
        if not group:
            continue
        shared = [r["static_shared_bytes"] + r.get("dynamic_shared_bytes", 0) for r in group]
        shown.add_row(
            kernel,
            arch,
            str(len(group)),
            _span(row["registers"] for row in group),
            _span(row["stack_bytes"] for row in group),
            _span(row["spill_store_bytes"] for row in group),
            _span(bytes // 1024 for bytes in shared),
            _span(row["code_bytes"] // 1024 for row in group),
            _names(row["tensor_cores"] for row in group),
            _names(row["global_memory"] for row in group),
        )
    return shown


def _span(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return f"{known[0]}" if len(known) == 1 else f"{known[0]}-{known[-1]}"


def _names(counts: Iterable[dict[str, int]]) -> str:
    return " ".join(sorted({name for count in counts for name in count}))


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def main(
    out: Annotated[Path | None, typer.Option("--json", help="write JSON into this file")] = None,
    arch: Annotated[str, typer.Option(help="for the Triton kernels")] = "80,90,100",
    gpus: Annotated[str, typer.Option(help="for the CUDA C++ kernels; may be empty")] = ",".join(
        GPUS
    ),
    kernels: Annotated[str, typer.Option(help="of the kernels, those with this text")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="typical calls of Triton alone")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> None:
    """Compile every kernel for every architecture and tell what the code is like."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    archs, chips = ([part for part in text.split(",") if part] for text in (arch, gpus))
    result = collect([int(part) for part in archs], chips, kernels, quick, jobs)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    if not console.is_terminal:
        console.width = 180
    tools = ", ".join(f"{name} {version}" for name, version in result["tools"].items())
    console.print(f"commit {result['commit']}{', changed' * result['dirty']}; {tools}")
    console.print(table(result["triton"], "Triton"))
    console.print(result["missing"] or table(result["cuda"], "CUDA C++"))
    if any("error" in row for row in result["triton"] + result["cuda"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(prog_name="python -m bench.aot")
