"""Who is who in a sequence: the modality of keys, the places of queries, the ranks of images.

``modality`` u8 ``[B, L]``: 0 padding, 1 text, 2 image; any other value counts as padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks

PADDING, TEXT, IMAGE = 0, 1, 2
AGGREGATES = ("product", "residual")
HEAD_MODES = ("mean", "per_head")


class Places(NamedTuple):
    """position: i64 [B, Lq] of each query; text, real: bool [B, Lq], whether it is text, and not
    padding; visible: bool [B, Lq, L], the keys that it sees; image: i64 [B, I], the position of the
    image token of a rank; exists: bool [B, I], whether there is one."""

    position: Tensor
    text: Tensor
    real: Tensor
    visible: Tensor
    image: Tensor
    exists: Tensor


def places(modality: Tensor, queries: int, num_image: int, positions: Tensor | None) -> Places:
    """What the definitions of this section speak of; queries is ``Lq``."""
    B, L = modality.shape
    key = torch.arange(L, device=modality.device)
    is_image = modality == IMAGE
    last = key[L - queries :].expand(B, queries)
    position = last if positions is None else positions.long()
    inside = (position >= 0) & (position < L)
    own = modality.gather(1, position.clamp(0, L - 1)) if L else position
    text, real = inside & (own == TEXT), inside & ((own == TEXT) | (own == IMAGE))
    visible = (key <= position[..., None]) & ((modality == TEXT) | is_image)[:, None]
    # stable: image tokens first, in ascending position
    order = (
        is_image.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :num_image]
    )
    exists = torch.arange(num_image, device=modality.device) < is_image.sum(1, keepdim=True)
    image = torch.zeros(B, num_image, dtype=torch.int64, device=modality.device)
    image[:, : order.shape[1]] = order
    return Places(position, text, real, visible & real[..., None], image, exists)


def check_modality(op: str, modality: Any, like: Tensor, name: str) -> None:
    """modality: u8 [B, L] on the device of ``like``, whose first dimension is B."""
    _checks.tensor(op, "modality", modality, "B, L")
    if modality.dtype != torch.uint8:
        raise TypeError(f"{op}: modality must be uint8, got {modality.dtype}")
    _checks.size(
        op, "modality", modality, (like.shape[0], modality.shape[1]), f"B of {name}, any L"
    )
    _checks.same_device(op, "modality", modality, like, name)


def check_positions(op: str, positions: Any, modality: Tensor, queries: int) -> None:
    """queries: Lq. query_positions: i32 [B, Lq] or None, the last Lq positions."""
    if queries > modality.shape[1]:
        raise ValueError(
            f"{op}: modality must have at least as many positions as there are queries"
            f" ({queries}), got {modality.shape[1]}"
        )
    if positions is None:
        return
    name = "query_positions"
    _checks.tensor(op, name, positions, "B, Lq")
    if positions.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {positions.dtype}")
    _checks.size(op, name, positions, (modality.shape[0], queries), "a place for each query")
    _checks.same_device(op, name, positions, modality, "modality")


def check_values(op: str, v: Any) -> None:
    _checks.tensor(op, "v", v, "B, G, L, dv")


def check_queries(op: str, q: Any, modality: Any) -> None:
    """q: [B, H, Lq, d] and modality: u8 [B, L]."""
    _checks.tensor(op, "q", q, "B, H, Lq, d")
    _checks.floating(op, "q", q)
    _checks.nonempty_features(op, "q", q)
    if q.shape[1] == 0:
        raise ValueError(f"{op}: q must have at least one head, got {list(q.shape)}")
    check_modality(op, modality, q, "q")


def check_like_queries(op: str, name: str, value: Tensor, q: Tensor) -> None:
    if value.dtype != q.dtype:
        raise TypeError(f"{op}: {name} must be {q.dtype} like q, got {value.dtype}")
    _checks.same_device(op, name, value, q, "q")


def check_groups(op: str, name: str, q: Tensor, groups: int) -> None:
    if groups == 0 or q.shape[1] % groups != 0:
        raise ValueError(
            f"{op}: {name} must have heads that divide the {q.shape[1]} of q, got {groups}"
        )


def check_attention(op: str, q: Any, k: Any, v: Any, modality: Any) -> None:
    """q: [B, H, Lq, d]; k: [B, G, L, d]; v: [B, G, L, dv] or None where an operator has none."""
    check_queries(op, q, modality)
    _checks.tensor(op, "k", k, "B, G, L, d")
    check_like_queries(op, "k", k, q)
    check_groups(op, "k", q, k.shape[1])
    expected = (q.shape[0], k.shape[1], modality.shape[1], q.shape[3])
    _checks.size(op, "k", k, expected, "B and d of q, L of modality")
    if v is not None:
        check_like_queries(op, "v", v, q)
        _checks.nonempty_features(op, "v", v)
        _checks.size(op, "v", v, (*k.shape[:3], v.shape[3]), "B, G, L of k")


def check_scores(
    op: str,
    q: Tensor,
    modality: Tensor,
    num_image: Any,
    aggregate: Any,
    head_mode: Any,
    text_image: Any,
) -> None:
    """What focus scores take beside queries and keys; q is [B, H, Lq, d]."""
    _checks.count(op, "num_image", num_image, 0)
    _checks.option(op, "aggregate", aggregate, AGGREGATES)
    _checks.option(op, "head_mode", head_mode, HEAD_MODES)
    length = modality.shape[1]
    if text_image is None:
        if q.shape[2] < length:
            raise ValueError(
                f"{op}: text_image must be given where there are fewer queries than positions"
                f" (Lq={q.shape[2]}, L={length}): it holds the rows of earlier calls"
            )
        return
    name = "text_image"
    _checks.tensor(op, name, text_image, "B, M, L_max, I")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if text_image.dtype != wanted:
        raise TypeError(f"{op}: {name} must be {wanted}, got {text_image.dtype}")
    heads = 1 if head_mode == "mean" else q.shape[1]
    expected = (q.shape[0], heads, text_image.shape[2], num_image)
    _checks.size(op, name, text_image, expected, "B, M, any L_max, I")
    if text_image.shape[2] < length:
        raise ValueError(
            f"{op}: {name} must have a row for each of the {length} positions,"
            f" got L_max={text_image.shape[2]}"
        )
    _checks.same_device(op, name, text_image, q, "q")


def check_selection(op: str, keep_ratio: Any, threshold: Any, min_keep: Any) -> None:
    """Exactly one of keep_ratio in (0, 1] and threshold in [0, 1)."""
    if (keep_ratio is None) == (threshold is None):
        raise ValueError(
            f"{op}: exactly one of keep_ratio and threshold must be given,"
            f" got keep_ratio={keep_ratio} and threshold={threshold}"
        )
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"{op}: keep_ratio must be in (0, 1], got {keep_ratio}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"{op}: threshold must be in [0, 1), got {threshold}")
    _checks.count(op, "min_keep", min_keep, 1)


def check_suppression(op: str, suppression: Any) -> None:
    if not 0 <= suppression <= 1:
        raise ValueError(f"{op}: suppression must be in [0, 1], got {suppression}")


# features of a head that the kernels for GPUs hold at a time
_WIDEST = 256


def too_wide(backend: str, *args: Any, **kwargs: Any) -> str | None:
    """Why a kernel cannot take heads of so many features; the first three arguments have them."""
    if backend not in ("cuda", "triton"):
        return None
    given = (*args[:3], *(kwargs.get(name) for name in ("q", "k", "v", "k_cache", "v_cache")))
    widest = max(x.shape[-1] for x in given if isinstance(x, Tensor) and x.dim() == 4)
    if widest <= _WIDEST:
        return None
    return f"the {backend} kernel takes heads of up to {_WIDEST} features, got {widest}"
