"""Calls for tests of what a kernel does beside its result: together they reach every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import queries_and_keys
from cases import device_of, normal, ragged, uniform
from contract import results
from torch import Tensor

import vmtc_kernels
from vmtc_kernels._registry import OPERATORS

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
