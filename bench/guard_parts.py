"""What guard.py counts: instructions of the C++ kernels, and the code of the GPU kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vmtc_kernels import _registry

ARCHS, GPUS = (80, 90, 100), ("90a",)

Row = dict[str, int]
Facts = dict[str, str]


class NotHere(Exception):
    """What is missing here, and where to get it."""


class Broken(Exception):
    """Why there are no rows although all that they take is here."""


@dataclass(frozen=True)
class Measured:
    """made_with: what the rows can only be compared with the same of."""

    made_with: Facts
    rows: dict[str, Row]


@dataclass(frozen=True)
class Part:
    """made_with: as far as it is known beforehand, so that nobody waits for what is not judged.
    measure: by so many processes."""

    made_with: Callable[[], Facts]
    measure: Callable[[int], Measured]


def cpu_tools() -> Facts:
    if _registry._C is None:
        raise NotHere(
            f"the compiled module does not load ({_registry._C_error}): make it, with a C++"
            " compiler (Debian package g++)"
        )
    if not shutil.which("valgrind"):
        raise NotHere("valgrind is not on PATH (Debian package valgrind)")
    if not torch._C._valgrind_supported_platform():
        raise NotHere("this build of torch cannot talk to valgrind")
    build = _registry._C.build_info()
    return {"compiler": build["compiler"], "flags": build["flags"], "torch": torch.__version__}


def count_instructions(only: str = "") -> Measured:
    """only: of the calls, those with this text in their name."""
    made_with = cpu_tools()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={folder / 'out'}", sys.executable]
        command += ["-m", f"{__package__}.guard_calls", name, only]
        # what is imported here is imported there
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise Broken(f"{' '.join(command)}: status {run.returncode}\n{run.stderr[-3000:]}")
        said = json.loads((folder / "calls.json").read_text())
        rows = {
            call: counts((folder / f"out.{i}").read_text())
            for i, call in enumerate(said["calls"], start=1)
        }
    if empty := [call for call, row in rows.items() if not row["own"]]:
        raise Broken(f"no instruction of vmtc_kernels._C was counted in {', '.join(empty)}")
    # valgrind shows programs a processor of its own making, without AVX-512
    return Measured({**made_with, "processor": said["capability"]}, rows)


def counts(dump: str) -> Row:
    """Rounded, as the last digits differ from run to run with where memory lies."""
    assert _registry._C and _registry._C.__file__
    objects = by_object(dump)
    called = [n for name, n in objects.items() if re.search("libtorch_cpu|mkl|blas", name)]
    own = objects[Path(_registry._C.__file__).name]
    return {"own": int(float(f"{own:.4g}")), "torch": int(float(f"{sum(called):.2g}"))}


def by_object(dump: str) -> Counter[str]:
    """Instructions by the name of the file that holds them, from what callgrind wrote.

    A line of two numbers is a place and its cost, in the object named last by ``ob=``; what follows
    ``calls=`` is the cost of what was called, which is told where that is. A name has a number,
    ``(3) /lib/libm.so``, and after the first time only that.
    """
    found: Counter[str] = Counter()
    names: dict[str, str] = {}
    current, called = "", False
    for line in dump.splitlines():
        if given := re.match(r"(c?ob)=\((\d+)\)(?: (.*))?", line):
            kind, number, name = given.groups()
            if name:
                names[number] = Path(name).name
            if kind == "ob":
                current = names[number]
        elif line.startswith("calls="):
            called = True
        elif cost := re.match(r"[+-]?\d+ (\d+)$|\* (\d+)$", line):
            if not called:
                found[current] += int(cost[1] or cost[2])
            called = False
    return found


def triton_tools() -> Facts:
    try:
        import triton
    except ImportError:
        raise NotHere("triton is not installed: pip install triton, on Linux") from None
    from . import aot_code

    ptxas = aot_code.version(aot_code.TOOLS / "ptxas")
    return {"triton": triton.__version__, "ptxas": str(ptxas)}


def cuda_tools() -> Facts:
    triton_tools()  # it brings what takes the code apart
    from . import aot, aot_code

    if not aot.nvcc():
        raise NotHere(
            "nvcc is neither on PATH nor in /usr/local/cuda/bin (Debian package"
            " nvidia-cuda-toolkit)"
        )
    if not shutil.which("c++filt"):
        raise NotHere("c++filt is not on PATH (Debian package binutils)")
    return {"nvcc": str(aot_code.version(aot.nvcc() or ""))}


def compile_triton(jobs: int) -> Measured:
    from . import aot

    found = aot.collect(ARCHS, (), quick=True, jobs=jobs)["triton"]
    return Measured(triton_tools(), code(found, triton_name))


def compile_cuda(jobs: int) -> Measured:
    from . import aot

    found = aot.collect((), GPUS, jobs=jobs)["cuda"]
    return Measured(cuda_tools(), code(found, cuda_name))


def triton_name(row: dict[str, Any]) -> str:
    """A variant by what it was compiled for; numbers that are only known at run time go without
    saying."""
    given = [
        f"{key.removesuffix('_ptr')}={value}"
        for key, value in row["arguments"].items()
        if value not in ("i32", "fp32")
    ]
    options = f"{row['num_warps']} warps {row['num_stages']} stages"
    return " ".join([row["kernel"], f"sm_{row['arch']}", options, *given])


def cuda_name(row: dict[str, Any]) -> str:
    return f"{row['file']} {row['kernel']} sm_{row['arch']}"


def code(found: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> dict[str, Row]:
    """The rows of aot.collect, without what is zero."""
    if failed := [f"{name(row)}: {row['error']}" for row in found if "error" in row]:
        raise Broken("does not compile: " + "\n".join(failed))
    rows = {}
    for row in found:
        facts = {
            "registers": row["registers"],
            "stack": row["stack_bytes"],
            "spill_stores": row["spill_store_bytes"],
            "spill_loads": row["spill_load_bytes"],
            "shared": row["static_shared_bytes"] + row.get("dynamic_shared_bytes", 0),
            "code": row["code_bytes"],
            **row["tensor_cores"],
        }
        rows[name(row)] = {fact: value for fact, value in facts.items() if value}
    assert len(rows) == len(found), "two variants of one name"
    return rows


PARTS = {
    "instructions": Part(cpu_tools, lambda jobs: count_instructions()),
    "triton": Part(triton_tools, compile_triton),
    "cuda": Part(cuda_tools, compile_cuda),
}
AOT = ("triton", "cuda")
