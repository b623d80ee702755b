"""CMAI over a paged cache: focus attention whose keys and values lie in blocks, by a table."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _modality, _registry
from .focus_attention import reference as _focus_reference


def paged_focus_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    modality: Tensor,
    num_image: int,
    *,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """`focus_attention` whose key ``j`` of sequence ``b`` is row ``j % block_size`` of block
    ``block_table[b, j // block_size]`` of the cache.

    Args:
        q: ``[B, H, Lq, d]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        k_cache, v_cache: ``[blocks, block_size, G, d]`` and ``[blocks, block_size, G, dv]``, any
            strides; the keys and values of the queries are in them already.
        block_table: int32 ``[B, max_blocks]``.
        seq_lens: int32 ``[B]``, keys of each sequence; those at or beyond it are padding, and so
            are keys whose table entry is no block.
        modality: uint8 ``[B, L]`` with ``Lq <= L <= max_blocks * block_size``.
        query_positions: int32 ``[B, Lq]``, strictly ascending; by default the last ``Lq`` of the
            sequence's ``seq_lens[b]`` positions.
        num_image, keep_ratio, threshold, aggregate, head_mode, renormalize, min_keep, suppression,
            scale, text_image: as in `focus_attention`.

    Returns:
        ``[B, H, Lq, dv]`` in the dtype of ``q``. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device, option or value, named.

    Source: CMAI, arXiv 2411.15453, as in `focus_attention`; the cache as vLLM lays it out.
    """
    return _op(
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        modality,
        num_image,
        keep_ratio,
        threshold,
        aggregate,
        head_mode,
        renormalize,
        min_keep,
        suppression,
        scale,
        text_image,
        query_positions,
    )


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    modality: Tensor,
    num_image: int,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """The definition of paged_focus_attention: the keys and values in order, then the same."""
    blocks, size = k_cache.shape[:2]
    place = torch.arange(modality.shape[1], device=q.device)
    entry = block_table[:, place // size].long()  # [B, L]
    inside = (place < seq_lens[:, None]) & (entry >= 0) & (entry < blocks)
    row = place.expand_as(entry)[inside] % size

    def gathered(cache: Tensor) -> Tensor:
        rows = cache.new_zeros(*entry.shape, *cache.shape[2:])
        rows[inside] = cache[entry[inside], row]
        return rows.transpose(1, 2)

    if query_positions is None:
        last = torch.arange(-q.shape[2], 0, device=q.device)
        query_positions = (seq_lens.clamp(max=modality.shape[1])[:, None] + last).int()
    return _focus_reference(
        q,
        gathered(k_cache),
        gathered(v_cache),
        modality.masked_fill(~inside, _modality.PADDING),
        num_image,
        keep_ratio,
        threshold,
        aggregate,
        head_mode,
        renormalize,
        min_keep,
        suppression,
        scale,
        text_image,
        query_positions,
    )


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    modality: Tensor,
    num_image: int,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> None:
    op = "paged_focus_attention"
    _modality.check_queries(op, q, modality)
    for name, cache, width in (("k_cache", k_cache, "d"), ("v_cache", v_cache, "dv")):
        _checks.tensor(op, name, cache, f"blocks, block_size, G, {width}")
        _modality.check_like_queries(op, name, cache, q)
        _checks.nonempty_features(op, name, cache)
        if 0 in cache.shape[:2]:
            raise ValueError(f"{op}: {name} must have blocks of rows, got {list(cache.shape)}")
    _modality.check_groups(op, "k_cache", q, k_cache.shape[2])
    _checks.size(op, "k_cache", k_cache, (*k_cache.shape[:3], q.shape[3]), "d of q")
    _checks.size(
        op, "v_cache", v_cache, (*k_cache.shape[:3], v_cache.shape[3]), "the first three of k_cache"
    )
    for name, table, shape in (
        ("block_table", block_table, "B, max_blocks"),
        ("seq_lens", seq_lens, "B"),
    ):
        _checks.tensor(op, name, table, shape)
        if table.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, got {table.dtype}")
        _checks.size(op, name, table, (q.shape[0], *table.shape[1:]), "B of q")
        _checks.same_device(op, name, table, q, "q")
    room = block_table.shape[1] * k_cache.shape[1]
    if modality.shape[1] > room:
        raise ValueError(
            f"{op}: modality must have at most max_blocks * block_size = {room} positions,"
            f" got {modality.shape[1]}"
        )
    _modality.check_positions(op, query_positions, modality, q.shape[2])
    _modality.check_scores(op, q, modality, num_image, aggregate, head_mode, text_image)
    _modality.check_selection(op, keep_ratio, threshold, min_keep)
    _modality.check_suppression(op, suppression)


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v_cache.shape[3])


_op = _registry.define(
    "paged_focus_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens,"
    " Tensor modality, SymInt num_image, float? keep_ratio=None, float? threshold=None,"
    " str aggregate='product', str head_mode='mean', bool renormalize=True, SymInt min_keep=1,"
    " float suppression=0.0, float? scale=None, Tensor(a!)? text_image=None,"
    " Tensor? query_positions=None) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    mutates="text_image",
    prefer=_dispatch.attention,
    refuse=_modality.too_wide,
)
