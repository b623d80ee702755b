"""What is in a cubin: registers, memory, and which instructions, as cuobjdump tells it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_TENSOR_CORES = re.compile(r"^(HGMMA|QGMMA|IGMMA|BGMMA|HMMA|IMMA|QMMA|DMMA|OMMA|UTC\w*MMA)\b")
# global and generic memory, with the copies to shared memory that bypass registers
_GLOBAL = re.compile(r"^(LDG|LDGSTS|LD|STG|ST|ATOMG?|RED|UBLK\w+|UTMA\w+)$")
_LOCAL = re.compile(r"^(LDL|STL)$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_USAGE = re.compile(r" Function (\S+):\s+(.*)")


def inspect(cubin: Path) -> dict[str, dict[str, Any]]:
    """For each kernel by its name in the file."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, usage in _USAGE.findall(_cuobjdump("-res-usage", cubin)):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", usage)}
        kernels[name] = {
            "registers": numbers["REG"],
            "stack_bytes": numbers["STACK"],
            "static_shared_bytes": numbers["SHARED"],
        }
    for part in _cuobjdump("-sass", cubin).split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        kernels[name.strip()] |= _instructions(_INSTRUCTION.findall(code))
    return kernels


def _instructions(opcodes: list[str]) -> dict[str, Any]:
    tensor_cores: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    local: Counter[str] = Counter()
    local_bytes: Counter[str] = Counter()
    for opcode in opcodes:
        base, *rest = opcode.split(".")
        width = next(
            (int(p.lstrip("US")) for p in rest if re.fullmatch(r"[US]?(8|16|64|128)", p)), 32
        )
        if _TENSOR_CORES.match(base):
            tensor_cores[base] += 1
        elif _GLOBAL.match(base):
            memory[base if base.startswith("U") else f"{base}.{width}"] += 1
        elif _LOCAL.match(base):
            local[f"{base}.{width}"] += 1
            local_bytes[base] += width // 8
    return {
        "spill_store_bytes": local_bytes["STL"],
        "spill_load_bytes": local_bytes["LDL"],
        "tensor_cores": dict(sorted(tensor_cores.items())),
        "global_memory": dict(sorted(memory.items())),
        "local_memory": dict(sorted(local.items())),
        "code_bytes": 16 * len(opcodes),
    }


def readable(names: list[str]) -> dict[str, str]:
    """Names of C++ kernels without namespaces and parameters, as far as c++filt is here."""
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = {}
    for name, plain in zip(names, run.stdout.splitlines(), strict=True):
        plain = plain.replace("(anonymous namespace)::", "").removeprefix("void ")
        plain = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", plain)
        short[name] = re.sub(r"\b(?!\d)\w+::", "", plain)
    return short


def version(tool: str | Path) -> str | None:
    """For example 13.0; None where there is no such program."""
    if not shutil.which(tool):
        return None
    run = subprocess.run([tool, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\S+?),", run.stdout)
    return found[1] if found else None


def _cuobjdump(what: str, cubin: Path) -> str:
    command = [str(TOOLS / "cuobjdump"), what, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
