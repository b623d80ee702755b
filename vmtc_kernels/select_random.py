"""Baseline: keep tokens at random, reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _registry
from .select_strided import SelectedTokens, check_selection, selection_backward, setup_selection


def select_random(
    x: Tensor, num_tokens: int, *, seed: int = 0, valid: Tensor | None = None
) -> SelectedTokens:
    r"""Keep ``M`` valid tokens drawn without replacement, in ascending position.

    The ``M`` positions ``i`` of smallest ``mix(i + mix(seed))`` are kept, with ``mix`` a 32-bit
    integer hash: the draw depends on nothing but seed, valid positions and ``M``, so it is the same
    on every device and for every place of an image in its batch.

    Args:
        x: ``[B, N, D]``, float32, float16, bfloat16 or float64, any strides.
        num_tokens: ``M`` of at least 1; at most ``N`` unless ``valid`` is given.
        seed: 0 to 2**32 - 1; the same seed draws the same positions.
        valid: bool ``[B, N]``, True for real tokens.

    Returns:
        `SelectedTokens`: ``tokens`` ``[B, M, D]``, copied bit for bit, and ``positions`` i32
        ``[B, M]``. Unfilled slots are zero vectors of position -1. Differentiable in ``x``.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device, count or seed, named.

    Source: ours, a baseline; the hash is the finaliser of MurmurHash3 (public domain).
    """
    return SelectedTokens(*_op(x, num_tokens, seed, valid))


def mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, that scatters neighbours."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor & 0xFFFFFFFF
    return h ^ (h >> 16)


def reference(
    x: Tensor, num_tokens: int, seed: int = 0, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of select_random, one image at a time."""
    tokens, index = _fake(x, num_tokens, seed, valid)
    tokens.zero_(), index.fill_(-1)
    everyone = torch.arange(x.shape[1], device=x.device)
    draw = mix((everyone + mix(torch.tensor(seed, device=x.device))) & 0xFFFFFFFF)
    for b in range(x.shape[0]):
        position = everyone if valid is None else everyone[valid[b]]
        kept = position[draw[position].argsort()[:num_tokens].sort().values]
        index[b, : len(kept)] = kept.int()
        tokens[b, : len(kept)] = x[b, kept]
    return tokens, index


def _check(x: Tensor, num_tokens: int, seed: int = 0, valid: Tensor | None = None) -> None:
    check_selection("select_random", x, num_tokens, valid)
    _checks.count("select_random", "seed", seed, 0)
    if seed >= 2**32:
        raise ValueError(f"select_random: seed must be below 2**32, got {seed}")


def _fake(
    x: Tensor, num_tokens: int, seed: int = 0, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    return x.new_empty(B, num_tokens, D), x.new_empty(B, num_tokens, dtype=torch.int32)


_op = _registry.define(
    "select_random",
    "(Tensor x, SymInt num_tokens, int seed=0, Tensor? valid=None)"
    " -> (Tensor tokens, Tensor positions)",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=setup_selection,
    backward=selection_backward,
)
