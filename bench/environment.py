"""What a number depends on besides the code: recorded beside every result."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

import vmtc_kernels

ROOT = Path(__file__).parents[1]
# with the sources beside it, and not installed somewhere
CHECKOUT = (ROOT / "csrc").is_dir()
PACKAGES = ("torch", "triton", "numpy", "scipy", "transformers")
RIVALS = ("faiss-cpu", "scikit-learn", "fast-pytorch-kmeans", "fastkmeans", "flash-kmeans")
RIVALS += ("flash-colsum", "flash-attn", "flashinfer-python")
# settings that change the speed of a numerical library
_TELLING = re.compile(
    r"^(OMP|OPENBLAS|MKL|KMP|GOMP|ATEN|ONEDNN|DNNL|TORCH|VMTC|CUDA|CUBLAS|PYTORCH|TRITON|NVIDIA)_"
)
# what nvidia-smi tells of a GPU that may change while it works
_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


def limit_threads(threads: int) -> None:
    """Give every numerical library that is installed the same number of threads.

    One for each processor is what they take by themselves, and then nothing but torch is touched:
    faiss was seen to become twice as slow for being told the number that it had.
    """
    torch.set_num_threads(threads)
    for name in ("faiss", "sklearn.cluster"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if threads != os.cpu_count():
        # sees every OpenMP and BLAS loaded by now, faiss's own included
        threadpoolctl.threadpool_limits(threads)


# processors kept busy by others, from which on a measurement counts as disturbed
QUIET = 0.1


class Others:
    """How many processors other processes kept busy since this was made; None where unknown.

    Threads that wait for one another suffer from company many times over: ten times slower k-means
    was seen beside one busy process on two processors.
    """

    def __init__(self) -> None:
        self._start = self._seconds(), time.monotonic()

    def busy(self) -> float | None:
        used, since = self._start
        now = self._seconds()
        if used is None or now is None:
            return None
        return max(0.0, (now - used) / (time.monotonic() - since))

    @staticmethod
    def _seconds() -> float | None:
        """Processor time of the machine without ours and that of our child processes."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _wait, *rest = map(int, stat.read_text().split()[1:9])
        ticks = user + nice + system + sum(rest)
        for child in multiprocessing.active_children():
            # user and system time follow the name in brackets, at places 14 and 15
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks -= int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def describe(threads: int, device: str = "cpu") -> dict[str, Any]:
    revision = _git("rev-parse", "--short=12", "HEAD")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": revision or os.environ.get("COMMIT") or "unknown",
        "dirty": bool(_git("status", "--porcelain")) if revision else None,
        "device": device,
        **({"gpu": gpu()} if device == "cuda" else {}),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "clocks_mhz": clocks(),
        "threads": threads,
        "thread_pools": [_pool(pool) for pool in threadpoolctl.threadpool_info()],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "vmtc_kernels": vmtc_kernels.__version__,
            **{name: _version(name) for name in PACKAGES + RIVALS},
        },
        "backends": vmtc_kernels.available_backends(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if _TELLING.match(k)},
    }


def command() -> str:
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    module = program.name == "__main__.py"
    return " ".join([f"python -m {program.parent.name}" if module else program.name, *arguments])


def gpu() -> dict[str, Any]:
    """The current GPU, and what its programs are made with."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    nvcc = re.search(r"release (\S+),", _answer("nvcc", "--version"))
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc[1] if nvcc else None,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "state": gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and what holds the clocks back; empty without nvidia-smi."""
    query = f"--query-gpu={','.join(_STATE)}"
    answer = _answer("nvidia-smi", query, "--format=csv,noheader").splitlines()[:1]
    return dict(zip(_STATE, answer[0].split(", "), strict=True)) if answer else {}


def cpu_model() -> str:
    named = _cpuinfo("model name")
    return named[0] if named else platform.processor() or platform.machine()


def clocks() -> list[float]:
    """MHz of each processor as this is called; empty where unknown."""
    return [float(mhz) for mhz in _cpuinfo("cpu MHz")]


def _cpuinfo(key: str) -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    return re.findall(rf"^{key}\s*:\s*(.+?)\s*$", info.read_text(), re.M)


def result_name(environment: dict[str, Any]) -> str:
    """<device>-<commit>[-dirty].json"""
    named = environment["gpu"]["name"] if "gpu" in environment else environment["cpu"]
    device = re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")
    dirty = "-dirty" if environment["dirty"] else ""
    return f"{device}-{environment['commit']}{dirty}.json"


def _pool(pool: dict[str, Any]) -> str:
    """For example ``numpy.libs: openblas 0.3.31 SkylakeX, 2 threads``."""
    parts = [pool["internal_api"], pool["version"], pool.get("architecture")]
    owner = Path(pool["filepath"]).parent
    owner = owner.parent if owner.name == "lib" else owner
    return f"{owner.name}: {' '.join(filter(None, parts))}, {pool['num_threads']} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """The answer of git, empty where there is no repository of ours or no git."""
    return _answer("git", *arguments) if CHECKOUT else ""


def _answer(*command: str) -> str:
    """What a program prints, empty where there is no such program or it fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
