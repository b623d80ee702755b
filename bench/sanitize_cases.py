"""``python bench/sanitize_cases.py``: a few small calls of every GPU kernel, for compute-sanitizer.

Every operator on the backends triton and cuda, k-means in both of its forms, in each dtype that a
kernel treats in its own way. Prints each call before it runs, so that a report is read beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import vmtc_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Make = Callable[..., Tensor]


def _normal(device: str) -> Make:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return make


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Operator, what is special, arguments. Sizes are odd, so that every edge is ragged."""
    normal = _normal(device)
    # all pairs of few tokens are cheap; of so many tokens with so few features they are not
    for form, N, D in (("pairs", 45, 72), ("direct", 1100, 3)):
        for metric in ("cosine", "euclidean"):
            x, scores, some = normal(2, N, D, dtype=dtype), normal(2, N), normal(2, N) > -0.5
            options: dict[str, Any] = {"iterations": 2, "metric": metric}
            yield "kmeans", f"{form}, {metric}", {"x": x, "num_clusters": 5, **options}
            merge = {"x": x, "scores": scores, "num_primary": 6, "num_merged": 5, **options}
            yield "merge_tokens", f"{form}, {metric}", merge
            yield "merge_tokens", f"{form}, {metric}, ragged", {**merge, "valid": some}
    x, scores, some = normal(2, 45, 17, dtype=dtype), normal(2, 45), normal(2, 45) > -0.5
    # equal tokens leave clusters empty, tokens that are not finite fill none
    odd = torch.ones_like(x)
    odd[:, 7, 3] = torch.nan
    shared = {"scores": scores, "num_primary": 3}
    yield "merge_tokens", "empty clusters, NaN", {"x": odd, "num_merged": 9, **shared}
    features = normal(2, 45, 21, dtype=dtype)
    yield (
        "merge_tokens",
        "features, strides",
        {"x": x.mT.contiguous().mT, "features": features, "num_merged": 4, **shared},
    )
    yield "merge_tokens", "prune", {"x": x, "num_merged": 0, **shared}
    q, k = (normal(2, 3, 67, 24, dtype=dtype) for _ in range(2))
    for cls_index in (0, 66, None):
        yield "token_importance", f"{cls_index=}", {"q": q, "k": k, "cls_index": cls_index}
    yield from focus_cases(normal, device, dtype)
    yield "spatial_downsample", "ragged edge", {"x": x, "grid": (5, 9), "factor": 2}
    for name in ("select_random", "select_strided"):
        yield name, "ragged", {"x": x, "num_tokens": 30, "valid": some}


def focus_cases(
    normal: Make, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Text, images, padding; prefill, a chunk, decode; whole and per head."""
    L, images = 77, 40
    modality = torch.ones(2, L, dtype=torch.uint8)
    modality[0, 9:49], modality[1, :5], modality[1, 20:33], modality[1, 40:60] = 2, 0, 2, 2
    modality = modality.to(device)
    k, v = normal(2, 2, L, 40, dtype=dtype), normal(2, 2, L, 24, dtype=dtype)
    for queries in (L, 19, 1):
        for head_mode, rule in (("mean", {"keep_ratio": 0.3}), ("per_head", {"threshold": 0.7})):
            heads = 1 if head_mode == "mean" else 4
            q, state = normal(2, 4, queries, 40, dtype=dtype), normal(2, heads, L, images).abs()
            shared = {"modality": modality, "text_image": state, "num_image": images}
            shared["head_mode"] = head_mode
            what = f"{queries} queries, {head_mode}"
            yield "focus_scores", what, {"q": q, "k": k, **shared}
            yield "focus_attention", what, {"q": q, "k": k, "v": v, **shared, **rule}
            scores = normal(2, heads, queries, images, dtype=dtype)
            yield "focus_mask", what, {"scores": scores, "modality": modality, **rule}
            bits = torch.randint(-(2**31), 2**31, (2, heads, queries, 2)).int().to(device)
            attention = {"q": q, "k": k, "v": v, "modality": modality, "mask": bits}
            yield "masked_attention", what, attention
            if queries == L:
                continue
            blocks = torch.randperm(2 * 10).view(2, 10).int().to(device)
            caches = {
                "k_cache": normal(20, 8, 2, 40, dtype=dtype),
                "v_cache": normal(20, 8, 2, 24, dtype=dtype),
                "block_table": blocks,
                "seq_lens": torch.tensor([L, 50], dtype=torch.int32, device=device),
            }
            yield "paged_focus_attention", what, {"q": q, **caches, **shared, **rule}


def main(
    device: str, backends: list[str], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[int, int]:
    """How many calls ran, and how many raised. A backend that is not there, or has no such kernel,
    is said and passed over."""
    ran = failed = 0
    for backend in backends:
        missing = vmtc_kernels.available_backends()[backend]
        if missing:
            print(f"{backend}: {missing}")
            continue
        for dtype in dtypes:
            for op, what, arguments in cases(device, dtype):
                if backend not in implementations(op):
                    continue
                print(f"{op}, {backend}, {dtype}: {what}", flush=True)
                try:
                    with vmtc_kernels.use_backend(backend):
                        getattr(vmtc_kernels, op)(**arguments)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    ran += 1
                except RuntimeError as error:
                    failed += 1
                    print(f"  {type(error).__name__}: {error}", flush=True)
    print(f"{ran} calls ran, {failed} failed")
    return ran, failed


def implementations(op: str) -> set[str]:
    """The backends that have a kernel for an operator."""
    return set(vmtc_kernels._registry.OPERATORS[op].implementations)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    parser.add_argument("--dtypes", nargs="+", default=[str(dtype)[6:] for dtype in DTYPES])
    given = parser.parse_args()
    chosen = tuple(getattr(torch, name) for name in given.dtypes)
    ran, failed = main(given.device, given.backends, chosen)
    if not ran or failed:
        sys.exit("calls failed" if failed else "no backend for a GPU can run")
