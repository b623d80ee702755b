"""What every operator must refuse: arguments that are right but for one, the error, its message.

Python values of a wrong type never reach the package: torch refuses them by the schema, with a
RuntimeError that names the argument in quotes.
"""

from __future__ import annotations

from typing import Any

import torch

Refused = tuple[dict[str, Any], Any, str]

BY_SCHEMA = (TypeError, RuntimeError)
X, S, Q = torch.zeros(2, 8, 3), torch.zeros(2, 8), torch.zeros(2, 3, 8, 4)
BOOL = torch.ones(2, 8, dtype=torch.bool)

A, K, U8 = torch.zeros(2, 4, 8, 3), torch.zeros(2, 2, 8, 3), torch.ones(2, 8, dtype=torch.uint8)
SCORES, BITS = torch.zeros(2, 1, 8, 5), torch.zeros(2, 1, 8, 1, dtype=torch.int32)
PLACES, STATE = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 1, 9, 5)

MODALITY: list[Refused] = [
    ({"modality": U8[0]}, ValueError, r"modality must be \[B, L\], got shape \[8\]"),
    ({"modality": U8.long()}, TypeError, "modality must be uint8, got torch.int64"),
    (
        {"modality": U8[:1]},
        ValueError,
        r"modality must be \[2, 8\] .B of \w+, any L., got \[1, 8\]",
    ),
    ({"modality": U8.to("meta")}, ValueError, "modality must be on cpu like \\w+"),
    ({"modality": U8[:, 1:]}, ValueError, "(modality|k) must "),
    (
        {"query_positions": PLACES.long()},
        TypeError,
        "query_positions must be int32, got torch.int64",
    ),
    (
        {"query_positions": PLACES[0]},
        ValueError,
        r"query_positions must be \[B, Lq\], got shape \[8\]",
    ),
    (
        {"query_positions": PLACES[:, 1:]},
        ValueError,
        r"query_positions must be \[2, 8\] .a place for each query., got \[2, 7\]",
    ),
    ({"query_positions": PLACES.to("meta")}, ValueError, "query_positions must be on cpu like"),
]
QUERIES: list[Refused] = [
    *MODALITY,
    ({"q": A[0]}, ValueError, r"q must be \[B, H, Lq, d\], got shape \[4, 8, 3\]"),
    ({"q": A.int()}, TypeError, "q must be float32, .* got torch.int32"),
    ({"q": A[..., :0]}, ValueError, "q must have at least one feature"),
    ({"q": A[:, :0]}, ValueError, r"q must have at least one head, got \[2, 0, 8, 3\]"),
    ({"q": A[:, :3]}, ValueError, r"k must have heads that divide the 3 of q, got 2"),
    ({"k": K[0]}, ValueError, r"k must be \[B, G, L, d\], got shape \[2, 8, 3\]"),
    ({"k": K.half()}, TypeError, "k must be torch.float32 like q, got torch.float16"),
    ({"k": K[:, :0]}, ValueError, r"k must have heads that divide the 4 of q, got 0"),
    ({"k": K[:, :, 1:]}, ValueError, r"k must be \[2, 2, 8, 3\] .*, got \[2, 2, 7, 3\]"),
    ({"k": K[..., 1:]}, ValueError, r"k must be \[2, 2, 8, 3\] .*, got \[2, 2, 8, 2\]"),
    ({"k": K.to("meta")}, ValueError, "k must be on cpu like q, got a tensor on meta"),
    ({"scale": "x"}, BY_SCHEMA, "'scale'.*str"),
]
VALUES: list[Refused] = [
    ({"v": K[0]}, ValueError, r"v must be \[B, G, L, dv\], got shape \[2, 8, 3\]"),
    ({"v": K.half()}, TypeError, "v must be torch.float32 like q, got torch.float16"),
    ({"v": K[:, 1:]}, ValueError, r"v must be \[2, 2, 8, 3\] .B, G, L of k., got \[2, 1, 8, 3\]"),
    ({"v": K[..., :0]}, ValueError, "v must have at least one feature"),
    ({"v": K.to("meta")}, ValueError, "v must be on cpu like q, got a tensor on meta"),
    ({"suppression": -0.5}, ValueError, r"suppression must be in \[0, 1\], got -0.5"),
    ({"suppression": 2.0}, ValueError, r"suppression must be in \[0, 1\], got 2.0"),
]
SCORING: list[Refused] = [
    ({"num_image": -1}, ValueError, "num_image must be at least 0, got -1"),
    ({"num_image": 1.5}, BY_SCHEMA, "'num_image'.*float"),
    (
        {"aggregate": "sum"},
        ValueError,
        r"aggregate must be one of \['product', 'residual'\], got 'sum'",
    ),
    (
        {"head_mode": "max"},
        ValueError,
        r"head_mode must be one of \['mean', 'per_head'\], got 'max'",
    ),
    ({"text_image": STATE[0]}, ValueError, r"text_image must be \[B, M, L_max, I\], got shape"),
    (
        {"text_image": STATE.half()},
        TypeError,
        "text_image must be torch.float32, got torch.float16",
    ),
    (
        {"text_image": STATE, "head_mode": "per_head"},
        ValueError,
        r"text_image must be \[2, 4, 9, 5\] .*, got \[2, 1, 9, 5\]",
    ),
    ({"text_image": STATE[..., 1:]}, ValueError, r"text_image must be \[2, 1, 9, 5\] .*, got"),
    ({"text_image": STATE[:, :, 2:]}, ValueError, "text_image must have a row for each of the 8"),
    ({"text_image": STATE.to("meta")}, ValueError, "text_image must be on cpu like q"),
    ({"q": A[:, :, 1:]}, ValueError, r"text_image must be given .* .Lq=7, L=8."),
]
RULES: list[Refused] = [
    ({"keep_ratio": None}, ValueError, "exactly one of keep_ratio and threshold must be given"),
    ({"threshold": 0.5}, ValueError, "exactly one of .* got keep_ratio=0.5 and threshold=0.5"),
    ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0.0"),
    ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must be in \(0, 1\], got 1.5"),
    (
        {"keep_ratio": None, "threshold": 1.0},
        ValueError,
        r"threshold must be in \[0, 1\), got 1.0",
    ),
    (
        {"keep_ratio": None, "threshold": -0.5},
        ValueError,
        r"threshold must be in \[0, 1\), got -0.5",
    ),
    ({"min_keep": 0}, ValueError, "min_keep must be at least 1, got 0"),
    ({"keep_ratio": "x"}, BY_SCHEMA, "'keep_ratio'.*str"),
]

TOKENS: list[Refused] = [
    ({"x": X[0]}, ValueError, r"x must be \[B, N, D\], got shape \[8, 3\]"),
    ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    ({"x": X[..., :0]}, ValueError, r"x must have at least one feature, got \[2, 8, 0\]"),
    ({"x": [1.0]}, BY_SCHEMA, "'x'.*list"),
]
VALID: list[Refused] = [
    ({"valid": S}, TypeError, "valid must be bool, got torch.float32"),
    ({"valid": BOOL[0]}, ValueError, r"valid must be \[B, N\], got shape \[8\]"),
    ({"valid": BOOL[:1]}, ValueError, r"valid must be \[2, 8\] \(B, N of x\), got \[1, 8\]"),
    ({"valid": BOOL[:, 1:]}, ValueError, r"valid must be \[2, 8\] \(B, N of x\), got \[2, 7\]"),
    ({"valid": BOOL.to("meta")}, ValueError, "valid must be on cpu like x, got a tensor on meta"),
    ({"valid": 3}, BY_SCHEMA, "'valid'.*int"),
]
CLUSTERING: list[Refused] = [
    ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
    ({"iterations": 1.5}, BY_SCHEMA, "'iterations'.*float"),
    ({"metric": "l1"}, ValueError, r"metric must be one of \['cosine', 'euclidean'\], got 'l1'"),
    ({"metric": 2}, BY_SCHEMA, "'metric'.*int"),
]
SELECTION: list[Refused] = [
    ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1, got 0"),
    ({"num_tokens": -1}, ValueError, "num_tokens must be at least 1, got -1"),
    ({"num_tokens": 9}, ValueError, r"num_tokens must be at most the 8 tokens of x .*, got 9"),
    ({"num_tokens": "3"}, BY_SCHEMA, "'num_tokens'.*str"),
]

# of each operator: arguments that are right, and the refused changes to them
BAD: dict[str, tuple[dict[str, Any], list[Refused]]] = {
    "kmeans": (
        {"x": X, "num_clusters": 2},
        [
            *TOKENS,
            *VALID,
            *CLUSTERING,
            ({"num_clusters": 0}, ValueError, "num_clusters must be at least 1, got 0"),
            ({"num_clusters": -3}, ValueError, "num_clusters must be at least 1, got -3"),
            ({"num_clusters": 2.5}, BY_SCHEMA, "'num_clusters'.*float"),
        ],
    ),
    "merge_tokens": (
        {"x": X, "scores": S, "num_primary": 2, "num_merged": 2},
        [
            *TOKENS,
            *VALID,
            *CLUSTERING,
            ({"scores": X}, ValueError, r"scores must be \[B, N\], got shape \[2, 8, 3\]"),
            ({"scores": S.long()}, TypeError, "scores must be float32, .* got torch.int64"),
            (
                {"scores": S[:, 1:]},
                ValueError,
                r"scores must be \[2, 8\] \(B, N of x\), got \[2, 7\]",
            ),
            (
                {"scores": S.to("meta")},
                ValueError,
                "scores must be on cpu like x, got a tensor on meta",
            ),
            ({"scores": 1.0}, BY_SCHEMA, "'scores'"),
            ({"num_primary": -1}, ValueError, "num_primary must be at least 0, got -1"),
            ({"num_merged": -2}, ValueError, "num_merged must be at least 0, got -2"),
            ({"num_primary": 1.5}, BY_SCHEMA, "'num_primary'.*float"),
            ({"num_primary": 0, "num_merged": 0}, ValueError, r"must be at least 1, got 0 \+ 0"),
            (
                {"num_merged": 7},
                ValueError,
                r"at most the 8 tokens of x .unless valid .*, got 2 \+ 7",
            ),
            (
                {"weighting": "x"},
                ValueError,
                r"weighting must be one of \['score', 'uniform'\], got 'x'",
            ),
            ({"features": S}, ValueError, r"features must be \[B, N, Df\], got shape \[2, 8\]"),
            ({"features": X.bool()}, TypeError, "features must be float32, .* got torch.bool"),
            (
                {"features": X[:, 1:]},
                ValueError,
                r"features must be \[2, 8\] \(B, N of x\), got \[2, 7\]",
            ),
            (
                {"features": X[:1]},
                ValueError,
                r"features must be \[2, 8\] \(B, N of x\), got \[1, 8\]",
            ),
            ({"features": X[..., :0]}, ValueError, "features must have at least one feature"),
            ({"features": X.to("meta")}, ValueError, "features must be on cpu like x"),
        ],
    ),
    "token_importance": (
        {"q": Q, "k": Q},
        [
            ({"q": Q[0]}, ValueError, r"q must be \[B, H, N, d\], got shape \[3, 8, 4\]"),
            ({"k": Q[0]}, ValueError, r"k must be \[B, H, N, d\], got shape \[3, 8, 4\]"),
            (
                {"q": Q.int()},
                TypeError,
                "q must be float32, float16, bfloat16 or float64, got torch.int32",
            ),
            ({"k": Q.half()}, TypeError, "k must be torch.float32 like q, got torch.float16"),
            (
                {"k": Q[:, :, 1:]},
                ValueError,
                r"k must be \[2, 3, 8, 4\] .the shape of q., got \[2, 3, 7, 4\]",
            ),
            (
                {"k": Q[:, :1]},
                ValueError,
                r"k must be \[2, 3, 8, 4\] .the shape of q., got \[2, 1, 8, 4\]",
            ),
            ({"k": Q.to("meta")}, ValueError, "k must be on cpu like q, got a tensor on meta"),
            (
                {"q": Q[..., :0], "k": Q[..., :0]},
                ValueError,
                r"q must have at least one feature, got \[2, 3",
            ),
            (
                {"q": Q[:, :0], "k": Q[:, :0]},
                ValueError,
                r"q must have at least one head, got \[2, 0, 8, 4\]",
            ),
            ({"cls_index": -1}, ValueError, "cls_index must be at least 0, got -1"),
            ({"cls_index": 8}, ValueError, "cls_index must be below the number of tokens 8, got 8"),
            ({"cls_index": 0.5}, BY_SCHEMA, "'cls_index'.*float"),
            ({"scale": "x"}, BY_SCHEMA, "'scale'.*str"),
            ({"q": None}, TypeError, r"q must be a tensor \[B, H, N, d\], got NoneType"),
        ],
    ),
    "spatial_downsample": (
        {"x": X, "grid": (2, 4), "factor": 2},
        [
            *TOKENS,
            ({"x": X[:, 1:]}, ValueError, "grid must hold the 7 tokens of x, got 2 x 4"),
            ({"grid": (4, 4)}, ValueError, "grid must hold the 8 tokens of x, got 4 x 4"),
            ({"grid": (8,)}, ValueError, r"grid must be \(gh, gw\), got \[8\]"),
            ({"grid": (1, 2, 4)}, ValueError, r"grid must be \(gh, gw\), got \[1, 2, 4\]"),
            ({"grid": (-2, -4)}, ValueError, "grid must be at least 1, got -4"),
            ({"grid": (0, 4)}, ValueError, "grid must be at least 1, got 0"),
            ({"grid": (2.0, 4)}, BY_SCHEMA, "'grid'"),
            ({"grid": 8}, (ValueError, *BY_SCHEMA), "grid"),
            ({"factor": 0}, ValueError, "factor must be at least 1, got 0"),
            ({"factor": -2}, ValueError, "factor must be at least 1, got -2"),
            ({"factor": 1.5}, BY_SCHEMA, "'factor'.*float"),
        ],
    ),
    "select_random": (
        {"x": X, "num_tokens": 2},
        [
            *TOKENS,
            *VALID,
            *SELECTION,
            ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
            ({"seed": 2**32}, ValueError, r"seed must be below 2\*\*32, got 4294967296"),
            ({"seed": 0.5}, BY_SCHEMA, "'seed'.*float"),
        ],
    ),
    "select_strided": ({"x": X, "num_tokens": 2}, [*TOKENS, *VALID, *SELECTION]),
    "focus_scores": ({"q": A, "k": K, "modality": U8, "num_image": 5}, [*QUERIES, *SCORING]),
    "focus_mask": (
        {"scores": SCORES, "modality": U8, "keep_ratio": 0.5},
        [
            *MODALITY,
            *RULES,
            ({"scores": SCORES[0]}, ValueError, r"scores must be \[B, M, Lq, I\], got shape"),
            ({"scores": SCORES.int()}, TypeError, "scores must be float32, .* got torch.int32"),
            ({"scores": SCORES[:, :0]}, ValueError, "scores must have at least one head"),
        ],
    ),
    "masked_attention": (
        {"q": A, "k": K, "v": K, "modality": U8, "mask": BITS},
        [
            *QUERIES,
            *VALUES,
            ({"mask": BITS[0]}, ValueError, r"mask must be \[B, M, Lq, W\], got shape \[1, 8, 1\]"),
            ({"mask": BITS.long()}, TypeError, "mask must be int32, got torch.int64"),
            (
                {"mask": BITS.expand(2, 2, 8, 1)},
                ValueError,
                "mask must have 1 head or the 4 of q, got 2",
            ),
            (
                {"mask": BITS[:, :, 1:]},
                ValueError,
                r"mask must be \[2, 1, 8, 1\] .*, got \[2, 1, 7",
            ),
            ({"mask": BITS.to("meta")}, ValueError, "mask must be on cpu like q"),
        ],
    ),
    "focus_attention": (
        {"q": A, "k": K, "v": K, "modality": U8, "num_image": 5, "keep_ratio": 0.5},
        [*QUERIES, *VALUES, *SCORING, *RULES],
    ),
}
