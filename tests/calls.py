"""One table of calls for every operator: (batch, tokens, dtype) -> the arguments by name.

Every tensor has the batch as its first dimension. Token counts are multiples of three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import normal, ragged, uniform
from sequences import attention_inputs, random_bits, sequences
from torch import Tensor

Call = Callable[[int, int, torch.dtype], dict[str, Any]]


def queries_and_keys(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    return {name: normal(*shape, dtype=dtype, seed=seed + i) for i, name in enumerate("qk")}


def without(arguments: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in arguments.items() if key != name}


CALLS: dict[str, dict[str, Call]] = {
    "kmeans": {
        "cosine": lambda B, N, dtype: {"x": normal(B, N, 24, dtype=dtype), "num_clusters": 4},
        "ragged euclidean": lambda B, N, dtype: {
            "x": normal(B, N, 16, dtype=dtype, seed=1),
            "num_clusters": 3,
            "iterations": 3,
            "metric": "euclidean",
            "valid": ragged(B, N),
        },
        "more clusters than tokens": lambda B, N, dtype: {
            "x": normal(B, N, 5, dtype=dtype),
            "num_clusters": 40,
            "iterations": 0,
            "valid": ragged(B, N),
        },
    },
    "merge_tokens": {
        "cosine by score": lambda B, N, dtype: {
            "x": normal(B, N, 24, dtype=dtype),
            "scores": uniform(B, N, dtype=dtype),
            "num_primary": 4,
            "num_merged": 3,
        },
        "ragged euclidean uniform": lambda B, N, dtype: {
            "x": normal(B, N, 16, dtype=dtype, seed=1),
            "scores": normal(B, N, dtype=dtype),
            "num_primary": 5,
            "num_merged": 2,
            "iterations": 3,
            "metric": "euclidean",
            "weighting": "uniform",
            "valid": ragged(B, N),
        },
        "features, ragged": lambda B, N, dtype: {
            "x": normal(B, N, 6, dtype=dtype, seed=2),
            "scores": normal(B, N, dtype=dtype, seed=2),
            "num_primary": 2,
            "num_merged": 4,
            "features": normal(B, N, 20, dtype=dtype, seed=3),
            "valid": ragged(B, N, seed=3),
        },
        "prune": lambda B, N, dtype: {
            "x": normal(B, N, 5, dtype=dtype),
            "scores": uniform(B, N, dtype=dtype),
            "num_primary": 3,
            "num_merged": 0,
        },
        "merge only": lambda B, N, dtype: {
            "x": normal(B, N, 17, dtype=dtype),
            "scores": uniform(B, N, dtype=dtype),
            "num_primary": 0,
            "num_merged": 5,
            "metric": "euclidean",
            "iterations": 1,
        },
    },
    "token_importance": {
        "cls": lambda B, N, dtype: queries_and_keys(B, 3, N, 16, dtype=dtype),
        "another cls, scale": lambda B, N, dtype: {
            **queries_and_keys(B, 1, N, 5, dtype=dtype, seed=2),
            "cls_index": 4,
            "scale": 0.25,
        },
        "received": lambda B, N, dtype: {
            **queries_and_keys(B, 2, N, 24, dtype=dtype),
            "cls_index": None,
        },
    },
    "spatial_downsample": {
        "divisible": lambda B, N, dtype: {
            "x": normal(B, N, 8, dtype=dtype),
            "grid": (N // 3, 3),
            "factor": 3 if N % 9 == 0 else 1,
        },
        "ragged edge": lambda B, N, dtype: {
            "x": normal(B, N, 17, dtype=dtype),
            "grid": (3, N // 3),
            "factor": 2,
        },
    },
    "select_random": {
        "full": lambda B, N, dtype: {"x": normal(B, N, 8, dtype=dtype), "num_tokens": 5},
        "ragged": lambda B, N, dtype: {
            "x": normal(B, N, 17, dtype=dtype),
            "num_tokens": 30,
            "seed": 77,
            "valid": ragged(B, N),
        },
    },
    "select_strided": {
        "full": lambda B, N, dtype: {"x": normal(B, N, 8, dtype=dtype), "num_tokens": 5},
        "ragged": lambda B, N, dtype: {
            "x": normal(B, N, 17, dtype=dtype),
            "num_tokens": 30,
            "valid": ragged(B, N),
        },
    },
    "focus_scores": {
        "mean": lambda B, N, dtype: {
            **without(attention_inputs(B, 4, 2, N, 16, dtype=dtype), "v"),
            "num_image": N // 2,
        },
        "per head, residual": lambda B, N, dtype: {
            **without(attention_inputs(B, 2, 1, N, 5, dtype=dtype, seed=3, first=1), "v"),
            "num_image": N // 3,
            "aggregate": "residual",
            "head_mode": "per_head",
            "renormalize": False,
            "scale": 0.3,
        },
    },
    "focus_mask": {
        "ratio": lambda B, N, dtype: {
            "scores": uniform(B, 1, N, N // 2, dtype=dtype),
            "modality": sequences(B, N),
            "keep_ratio": 0.3,
        },
        "threshold": lambda B, N, dtype: {
            "scores": normal(B, 2, N, N, dtype=dtype),
            "modality": sequences(B, N, 2),
            "threshold": 0.5,
            "min_keep": 3,
        },
    },
    "masked_attention": {
        "one mask": lambda B, N, dtype: {
            **attention_inputs(B, 4, 2, N, 16, dtype=dtype),
            "mask": random_bits(B, 1, N, 1),
        },
        "per head, suppressed": lambda B, N, dtype: {
            **attention_inputs(B, 2, 2, N, 8, dv=5, dtype=dtype, seed=3, first=1),
            "mask": random_bits(B, 2, N, 2),
            "suppression": 0.25,
            "scale": -0.4,
        },
    },
    "focus_attention": {
        "ratio": lambda B, N, dtype: {
            **attention_inputs(B, 4, 2, N, 16, dtype=dtype),
            "num_image": N // 2,
            "keep_ratio": 0.4,
        },
        "threshold, per head, suppressed": lambda B, N, dtype: {
            **attention_inputs(B, 2, 1, N, 8, dv=5, dtype=dtype, seed=3, first=1),
            "num_image": N // 3,
            "threshold": 0.9,
            "min_keep": 2,
            "head_mode": "per_head",
            "aggregate": "residual",
            "suppression": 0.25,
        },
    },
}
