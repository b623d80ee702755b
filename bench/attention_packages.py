"""Attention by packages with kernels of their own, each called as its documentation has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .attention import ALONE, PLAIN, Attend, Mask, Way
from .focus import Problem, Setup
from .packages import load

FOR_GPUS = "it works on GPUs alone"


def ways(setup: Setup, device: str) -> list[Way]:
    return [*flash_attention(setup, device), *flashinfer(setup, device)]


def _cannot(setup: Setup, device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return FOR_GPUS
    return None if setup.dtype in ("float16", "bfloat16") else "it takes half types alone"


def flash_attention(setup: Setup, device: str) -> list[Way]:
    """Plain causal attention: it takes no mask of pairs. Grouped heads as they are."""
    found = []
    for name, module, package in (
        ("FlashAttention 2", "flash_attn", "flash-attn"),
        ("FlashAttention 3", "flash_attn_interface", "flash-attn-3"),
    ):
        functions, missing = load(module, package, _cannot(setup, device))
        prepare = partial(_flash_attention, functions)
        found.append(Way(f"{name}, causal", PLAIN, prepare, False, missing))
    return found


def _flash_attention(functions: Any, given: Problem, _: Mask) -> Attend:
    decode = given.setup.phase == "decode"
    # the other splits no keys over the processors in version 3
    function = functions.flash_attn_with_kvcache if decode else functions.flash_attn_func

    def attend() -> Tensor:
        # [B, L, heads, d] with any strides but of d
        q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
        out = function(q, k, v, causal=True)
        # early versions of 3 return the logarithms of the sums besides
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def flashinfer(setup: Setup, device: str) -> list[Way]:
    """Ragged prefill, of one query in decode: planned, the mask packed and the layout changed
    beforehand. Grouped heads as they are."""
    module, missing = load("flashinfer", "flashinfer-python", _cannot(setup, device))
    return [
        Way(
            f"FlashInfer, {'ready mask' if masked else 'causal'}",
            ALONE if masked else PLAIN,
            partial(_flashinfer, module, masked),
            masked,
            missing,
            "it compiles",
        )
        for masked in (False, True)
    ]


def _flashinfer(module: Any, masked: bool, given: Problem, mask: Mask) -> Attend:
    setup, device = given.setup, given.q.device
    steps = torch.arange(setup.B + 1, dtype=torch.int32, device=device)
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")
    wrapper.plan(
        steps * setup.queries,
        steps * setup.length,
        setup.H,
        setup.G,
        setup.d,
        custom_mask=mask.allowed.flatten() if masked else None,
        causal=not masked,
        q_data_type=given.q.dtype,
    )
    # [B L, heads, d]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (given.q, given.k, given.v))

    def attend() -> Tensor:
        return wrapper.run(q, k, v).unflatten(0, (setup.B, setup.queries)).transpose(1, 2)

    return attend


@cache
def _workspace(device: torch.device) -> Tensor:
    """As large as is recommended; calls on one stream may share it."""
    return torch.empty(128 << 20, dtype=torch.uint8, device=device)


def flash_colsum(
    cls_index: int | None, device: str
) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str | None]:
    """Token importance of q and k ``[B, H, N, d]``, in half types, or why it is missing.

    Of version 0.1.0, rounded to float16. It takes what it pads for tokens: right where N is a
    multiple of 64, of 128 for one image; and of d it reads the first 64.
    """
    missing = None
    if torch.device(device).type != "cuda":
        missing = FOR_GPUS
    elif cls_index:
        missing = "its [CLS] tokens come first"
    module, missing = load("flash_colsum", "flash-colsum", missing)
    if missing:
        return None, missing
    count = None if cls_index is None else 1
    return lambda q, k: module.flash_colsum(q, k, cls_len=count), None
