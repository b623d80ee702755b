"""Calls for tests of what a kernel does beside its result: together they reach every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import queries_and_keys, without
from cases import device_of, normal, place, ragged, uniform
from contract import results
from sequences import attention_inputs, random_bits, sequences
from torch import Tensor

import vmtc_kernels
from vmtc_kernels._registry import OPERATORS


def attention_scores(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return without(attention_inputs(*args, **kwargs), "v")


# operator, and (batch, tokens, dtype, seed) -> its arguments
Case = tuple[str, Callable[[int, int, torch.dtype, int], dict[str, Any]]]
CASES: dict[str, Case] = {
    "kmeans, few tokens": (
        "kmeans",
        lambda B, N, dtype, seed: {
            "x": normal(B, N, 64, dtype=dtype, seed=seed),
            "num_clusters": 8,
            "iterations": 4,
        },
    ),
    "kmeans, many tokens, ragged": (
        "kmeans",
        lambda B, N, dtype, seed: {
            "x": normal(B, 6 * N, 6, dtype=dtype, seed=seed),
            "num_clusters": 7,
            "metric": "euclidean",
            "valid": ragged(B, 6 * N, seed),
        },
    ),
    "merge_tokens, ragged": (
        "merge_tokens",
        lambda B, N, dtype, seed: {
            "x": normal(B, N, 72, dtype=dtype, seed=seed),
            "scores": uniform(B, N, seed=seed),
            "num_primary": N // 5,
            "num_merged": 9,
            "valid": ragged(B, N, seed),
        },
    ),
    "merge_tokens, many tokens, features": (
        "merge_tokens",
        lambda B, N, dtype, seed: {
            "x": normal(B, 6 * N, 19, dtype=dtype, seed=seed),
            "scores": normal(B, 6 * N, dtype=dtype, seed=seed),
            "num_primary": N // 5,
            "num_merged": 5,
            "metric": "euclidean",
            "features": normal(B, 6 * N, 3, dtype=dtype, seed=seed + 1),
        },
    ),
    "merge_tokens, prune": (
        "merge_tokens",
        lambda B, N, dtype, seed: {
            "x": normal(B, N, 33, dtype=dtype, seed=seed),
            "scores": normal(B, N, seed=seed),
            "num_primary": N // 3,
            "num_merged": 0,
        },
    ),
    "token_importance, cls": (
        "token_importance",
        lambda B, N, dtype, seed: queries_and_keys(B, 3, N, 40, dtype=dtype, seed=seed),
    ),
    "token_importance, received": (
        "token_importance",
        lambda B, N, dtype, seed: {
            **queries_and_keys(B, 2, N, 24, dtype=dtype, seed=seed),
            "cls_index": None,
        },
    ),
}

CASES |= {
    "focus_scores, in chunks": (
        "focus_scores",
        lambda B, N, dtype, seed: {
            **attention_scores(B, 4, 2, N, 24, dtype=dtype, seed=seed),
            "num_image": N // 2,
            "text_image": uniform(B, 4, N + 3, N // 2, seed=seed),
            "head_mode": "per_head",
        },
    ),
    "focus_mask": (
        "focus_mask",
        lambda B, N, dtype, seed: {
            "scores": uniform(B, 2, N, N // 2, dtype=dtype, seed=seed),
            "modality": sequences(B, N),
            "keep_ratio": 0.4,
        },
    ),
    "masked_attention": (
        "masked_attention",
        lambda B, N, dtype, seed: {
            **attention_inputs(B, 4, 2, N, 40, dv=24, dtype=dtype, seed=seed),
            "mask": random_bits(B, 4, N, 1, seed),
            "suppression": 0.25,
        },
    ),
    "focus_attention, prefill": (
        "focus_attention",
        lambda B, N, dtype, seed: {
            **attention_inputs(B, 4, 2, N, 40, dtype=dtype, seed=seed),
            "num_image": N // 2,
            "keep_ratio": 0.4,
        },
    ),
    "focus_attention, decode": (
        "focus_attention",
        lambda B, N, dtype, seed: {
            **attention_inputs(B, 4, 2, N, 40, queries=1, dtype=dtype, seed=seed),
            "num_image": N // 2,
            "keep_ratio": 0.4,
            "text_image": uniform(B, 1, N + 3, N // 2, seed=seed),
        },
    ),
    "paged_focus_attention": (
        "paged_focus_attention",
        lambda B, N, dtype, seed: {
            "q": normal(B, 4, 1, 24, dtype=dtype, seed=seed),
            # a cache whose blocks are those of the sequences in order, so that it can be repeated
            "k_cache": normal(B, 1, N, 2, 24, dtype=dtype, seed=seed + 1).flatten(0, 1),
            "v_cache": normal(B, 1, N, 2, 24, dtype=dtype, seed=seed + 2).flatten(0, 1),
            "block_table": place(torch.arange(B, device="cpu").int()[:, None]),
            "seq_lens": place(torch.full((B,), N, device="cpu").int()),
            "modality": sequences(B, N),
            "num_image": N // 2,
            "keep_ratio": 0.4,
            "text_image": uniform(B, 1, N + 3, N // 2, seed=seed),
        },
    ),
}


def is_slow(backend: str) -> bool:
    """Interpreted, emulated, or one image at a time."""
    return device_of(backend) == "cpu" and backend != "cpu"


class Work:
    """A case on a backend."""

    def __init__(self, backend: str, case: Case) -> None:
        self.op, self.make = case
        if backend not in OPERATORS[self.op].implementations:
            pytest.skip(f"{self.op} has no {backend} kernel")
        self.tokens = 33 if is_slow(backend) else 200

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return self.make(3, self.tokens, dtype, seed)

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return results(getattr(vmtc_kernels, self.op)(**arguments))
