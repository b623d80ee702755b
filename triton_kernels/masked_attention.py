"""masked_attention: tiles of queries, or for few queries splits of the keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import flash
from .focus_bits import Bits, bits_by_key, lists
from .focus_decode import Logits, few, few_logits
from .focus_layout import Layout, layout
from .focus_values import few_values
from .launch import capability, device_guard, row_unit


def dense(x: Tensor) -> Tensor:
    """x with unit stride in its features."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def operands(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float | None, table: Tensor | None = None
) -> dict[str, Any]:
    """What every kernel takes that reads queries and keys.

    k, v: [B, G, L, d]; with a table i32 [B, pages] they are caches [blocks, page, G, d].
    """
    paged = table is not None
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    named = {n: dense(x) for n, x in named.items()}
    unit = min(row_unit(x) for x in named.values())
    given: dict[str, Any] = {}
    for name, x in named.items():
        given[f"{name}_ptr"] = x
        axes = "bnh" if paged and name != "q" else "bhn"
        given |= {f"stride_{name}{axis}": x.stride(i) // unit for i, axis in enumerate(axes)}
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return {
        **given,
        "table_ptr": table,
        "stride_tb": table.stride(0) if table is not None else 0,
        "PAGE": k.shape[1] if paged else 0,
        "H": q.shape[1],
        "share": q.shape[1] // k.shape[2 if paged else 1],
        "Lq": q.shape[2],
        "D": q.shape[3],
        "UNIT": unit,
        "exponent": abs(scale) * math.log2(math.e),
        "NEGATIVE": scale < 0,
    }


def attend(
    given: dict[str, Any],
    at: Layout,
    made: Bits | None,
    suppression: float,
    logits: Logits | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the operands, with inhibited pairs by key or none.

    logits: of few queries, where they are there already.
    """
    q, dv = given["q_ptr"], given["v_ptr"].shape[-1]
    out = torch.empty(*q.shape[:3], dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    values = {
        **given,
        **at.values(),
        "out_ptr": out,
        "lse_ptr": lse,
        "M": made.flags.shape[1] if made else 1,
        "penalty": math.log2(suppression) if suppression else -math.inf,
        "HAS_BITS": made is not None,
        "DV": dv,
    }
    if few(given):
        few_values(logits or few_logits(values), made, values)
        return out, lse
    choice = flash.tile(q.shape[3], dv, q.dtype, capability(q))
    found, lengths = None, None
    if made is not None:
        found, lengths = lists(made, at, suppression, choice.BLOCK_M, choice.BLOCK_N)
    values |= {
        "bits_ptr": made.bits if made else None,
        "flags_ptr": made.flags if made else None,
        "lists_ptr": found,
        "lengths_ptr": lengths,
        "tiles": found.shape[3] if found is not None else 0,
    }
    flash.flash(choice, values)
    return out, lse


def nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The results where there are no queries."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    suppression: float = 0.0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `vmtc_kernels.masked_attention`. float32, float16 or bfloat16."""
    if q.shape[0] * q.shape[2] == 0:
        return nothing(q, v)
    with device_guard(q):
        at = layout(modality, q.shape[2], query_positions)
        made = bits_by_key(mask, at) if mask.shape[3] and suppression != 1 else None
        return attend(operands(q, k, v, scale), at, made, suppression)
