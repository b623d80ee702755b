"""What every launcher asks of the device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds x; (9, 0) for CPU tensors under the interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU that holds x the current one; does nothing for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def row_unit(x: Tensor) -> int:
    """Elements of 16 bytes where the rows of x [..., D] begin at such steps, else 1.

    Kernels take strides in this unit and multiply by it, so that the compiler sees the alignment.
    """
    unit = 16 // x.element_size()
    return unit if all(stride % unit == 0 for stride in x.stride()[:-1]) else 1


def launch(kernel: Any, programs: int, values: dict[str, Any], **more: Any) -> None:
    """kernel with those of the values that it takes, and with all that is named."""
    taken = {name: values[name] for name in kernel.arg_names if name in values and name not in more}
    kernel[(programs,)](**taken, **more)
