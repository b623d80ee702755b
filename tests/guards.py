"""Memory with guards around every tensor that a kernel allocates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# a multiple of every alignment that a kernel may ask for
GUARD = 4096
PATTERN = 0xA5
FACTORIES = (
    "empty.memory_format empty_strided.default empty_like.default new_empty.default"
    " new_empty_strided.default zeros.default zeros_like.default new_zeros.default full.default"
    " full_like.default new_full.default ones.default ones_like.default"
)
_FACTORIES = {f"aten.{name}" for name in FACTORIES.split()}


class GuardedMemory(TorchDispatchMode):
    """Within it every new tensor lies between two guards, also one that C++ code allocates.

    Enter it around the kernel of a backend itself: operators are not dispatched anew within it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("vmtc"):
            on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in args)
            key = torch._C.DispatchKey.CUDA if on_gpu else torch._C.DispatchKey.CPU
            # past the key of this mode, so that it stays on for what the kernel calls
            with self:
                return func._op_dk(key, *args, **kwargs)
        result = func(*args, **kwargs)
        return self._guarded(result) if str(func) in _FACTORIES else result

    def _guarded(self, fresh: Tensor) -> Tensor:
        size = fresh.untyped_storage().nbytes()
        if size == 0 or fresh.device.type == "meta":
            return fresh
        block = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8, device=fresh.device)
        # an empty tensor of the tests is poisoned: its contents count
        block[GUARD:-GUARD] = torch.empty(0, dtype=torch.uint8, device=fresh.device).set_(
            fresh.untyped_storage()
        )
        self._blocks.append(block)
        inside = block[GUARD:-GUARD].view(fresh.dtype)
        return inside.as_strided(fresh.shape, fresh.stride(), inside.storage_offset())

    def check(self) -> int:
        """How many tensors were guarded; fails if anything wrote beside one of them."""
        for block in self._blocks:
            for side, guard in (("before", block[:GUARD]), ("behind", block[-GUARD:])):
                wrong = (guard != PATTERN).nonzero()
                assert not len(wrong), (
                    f"{len(wrong)} bytes {side} a tensor of {len(block) - 2 * GUARD} bytes were"
                    f" written, the first at {int(wrong[0])} of {GUARD}"
                )
        return len(self._blocks)
