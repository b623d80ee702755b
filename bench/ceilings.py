"""What the device reaches at all: on a copy, and on a matrix product of the usual type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import timing
from .machine import Machine
from .runner import Meter

# rows and columns of the matrices; the copy is of eight of them
ROWS = {"cpu": 2048, "cuda": 8192}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CALLS = {"cpu": 1, "cuda": 10}


def measure(meter: Meter, machine: Machine, rows: int = 0) -> dict[str, Any]:
    """Bytes read and written, and FLOPs, a second: medians of nine samples.

    Random data: products of zeros were seen to run faster.
    """
    kind = "cuda" if machine.gpu else "cpu"
    rows, dtype = rows or ROWS[kind], DTYPES[kind]
    source = torch.empty(8 * rows, rows, dtype=dtype, device=machine.device).normal_()
    target = torch.empty_like(source)
    a, b = (source[i * rows : (i + 1) * rows] for i in range(2))
    copy = _median(meter.clock, lambda: target.copy_(source), CALLS[kind])
    product = _median(meter.clock, lambda: a @ b, CALLS[kind])
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "flops_per_s": 2 * rows**3 / product,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _median(clock: timing.Clock, call: Callable[[], Any], calls: int) -> float:
    for _ in range(3):
        call()
    return sorted(clock.measure(call, calls) for _ in range(9))[4]
