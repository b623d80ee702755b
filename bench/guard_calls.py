"""``python -m bench.guard_calls FOLDER [TEXT]``: what guard.py counts, run by it under callgrind.

Every C++ kernel in calls that take each way through it once. What is collected is left in FOLDER,
a file a call, and ``calls.json``: the calls in that order and what ATen took the processor for.
TEXT: of the calls, those with it in their name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vmtc_kernels

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# text, image, text
BEFORE, IMAGES, AFTER = 12, 100, 16
LENGTH = BEFORE + IMAGES + AFTER

Made = tuple[str, str, dict[str, Any]]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Normal:
    def __init__(self, dtype: torch.dtype) -> None:
        self._generator, self.dtype = _seeded(0), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)


def calls() -> Iterator[Made]:
    """(operator, what is special, arguments)"""
    for name, dtype in DTYPES.items():
        for group in (_importance, _clusters, _baselines, _scores, _attention, _paged):
            for op, what, arguments in group(Normal(dtype)):
                yield op, f"{what}, {name}", arguments


def _importance(normal: Normal) -> Iterator[Made]:
    q, k = normal(2, 4, 197, 64), normal(2, 4, 197, 64)
    yield "token_importance", "cls", {"q": q, "k": k}
    yield "token_importance", "received", {"q": q, "k": k, "cls_index": None}


def _clusters(normal: Normal) -> Iterator[Made]:
    # tokens around centres, as neighbours in an image are: some rounds change few labels
    x = (normal(12, 200)[torch.arange(196) // 7 % 12] + normal(1, 196, 200)).to(normal.dtype)
    valid = torch.arange(196)[None] % 5 > 0
    scores = torch.rand(1, 196, generator=_seeded(1))
    for metric in ("cosine", "euclidean"):
        given: dict[str, Any] = {"x": x, "iterations": 5, "metric": metric}
        yield "kmeans", metric, {**given, "num_clusters": 16}
        yield "kmeans", f"{metric}, ragged", {**given, "num_clusters": 16, "valid": valid}
        given |= {"scores": scores, "num_primary": 32, "num_merged": 16}
        for weighting in ("score", "uniform"):
            yield "merge_tokens", f"{metric}, {weighting}", {**given, "weighting": weighting}
    given |= {"features": normal(1, 196, 64), "valid": valid}
    yield "merge_tokens", "features, ragged", given
    yield "merge_tokens", "prune", {"x": x, "scores": scores, "num_primary": 64, "num_merged": 0}


def _baselines(normal: Normal) -> Iterator[Made]:
    x, valid = normal(2, 575, 200), torch.arange(575).expand(2, -1) % 5 > 0
    yield "spatial_downsample", "ragged edge", {"x": x, "grid": (25, 23), "factor": 2}
    for op in ("select_random", "select_strided"):
        yield op, "all", {"x": x, "num_tokens": 300}
        yield op, "ragged", {"x": x, "num_tokens": 300, "valid": valid}


def _modality() -> Tensor:
    """uint8 [2, LENGTH]: text, image, text; and the same behind padding."""
    modality = torch.ones(2, LENGTH, dtype=torch.uint8)
    modality[:, BEFORE : BEFORE + IMAGES] = 2
    modality[1, : BEFORE // 2] = 0
    return modality


RULES: dict[str, dict[str, Any]] = {
    "ratio": {"keep_ratio": 0.5},
    "threshold": {"threshold": 0.5, "min_keep": 3, "suppression": 0.25},
}
HEADS: dict[str, dict[str, Any]] = {
    "mean": {},
    "per head": {"head_mode": "per_head", "aggregate": "residual", "renormalize": False},
}
# the queries of a prefill, of a later part of it, and of a decoding step
QUERIES = {"prefill": LENGTH, "part": 12, "decode": 1}


def _scores(normal: Normal) -> Iterator[Made]:
    shared = {"modality": _modality(), "num_image": IMAGES}
    k = normal(2, 2, LENGTH, 64)
    for when, queries in QUERIES.items():
        for heads, how in HEADS.items():
            given = {"q": normal(2, 4, queries, 64), "k": k, **shared, **how}
            yield "focus_scores", f"{when}, {heads}", {**given, **_state(heads)}
    scores = normal(2, 4, LENGTH, IMAGES)
    for what, rule in RULES.items():
        rule = {key: value for key, value in rule.items() if key != "suppression"}
        yield "focus_mask", what, {"scores": scores, "modality": _modality(), **rule}


def _state(heads: str) -> dict[str, Tensor]:
    shape = (2, 4 if heads == "per head" else 1, LENGTH, IMAGES)
    return {"text_image": torch.rand(shape, generator=_seeded(2))}


def _attention(normal: Normal) -> Iterator[Made]:
    k, v = normal(2, 2, LENGTH, 64), normal(2, 2, LENGTH, 40)
    for when, queries in QUERIES.items():
        given: dict[str, Any] = {"q": normal(2, 4, queries, 64), "k": k, "v": v}
        given["modality"] = _modality()
        bits = torch.randint(-(2**31), 2**31, (2, 1, queries, 4), generator=_seeded(2)).int()
        for what, suppression in (("inhibited", 0.0), ("suppressed", 0.25)):
            more = {"mask": bits, "suppression": suppression}
            yield "masked_attention", f"{when}, {what}", {**given, **more}
        given["num_image"] = IMAGES
        for (what, rule), (heads, how) in zip(RULES.items(), HEADS.items(), strict=True):
            more = {**rule, **how, **_state(heads)}
            yield "focus_attention", f"{when}, {what}, {heads}", {**given, **more}


def _paged(normal: Normal) -> Iterator[Made]:
    order = torch.randperm(16, generator=_seeded(3))
    given: dict[str, Any] = {
        "k_cache": normal(16, 16, 2, 64),
        "v_cache": normal(16, 16, 2, 40),
        "block_table": order.view(2, 8).int(),
        "seq_lens": torch.tensor([LENGTH, LENGTH - 9], dtype=torch.int32),
        "modality": _modality(),
        "num_image": IMAGES,
    }
    for when in ("part", "decode"):
        q = normal(2, 4, QUERIES[when], 64)
        for (what, rule), (heads, how) in zip(RULES.items(), HEADS.items(), strict=True):
            more = {"q": q, **rule, **how, **_state(heads)}
            yield "paged_focus_attention", f"{when}, {what}, {heads}", {**given, **more}


def names() -> list[str]:
    return [f"{op}: {what}" for op, what, _ in calls()]


def instrument() -> None:
    """Count from here on: to import torch takes four times as long when it is counted."""
    command = ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"]
    asked = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # a process that waits would have to be woken by ptrace, which containers may forbid
    while asked.poll() is None:
        pass
    if asked.returncode:
        sys.exit(f"{' '.join(command)}: exit status {asked.returncode}")


def main(folder: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    chosen = [(f"{op}: {what}", op, given) for op, what, given in calls()]
    chosen = [call for call in chosen if only in call[0]]
    with vmtc_kernels.use_backend("cpu"):
        for _, op, given in chosen:
            # what the first call alone does: symbols are looked up, memory is asked for
            getattr(vmtc_kernels, op)(**given)
        instrument()
        for _, op, given in chosen:
            run = getattr(vmtc_kernels, op)
            torch._C._valgrind_toggle()
            run(**given)
            torch._C._valgrind_toggle_and_dump_stats()
    capability = torch.backends.cpu.get_cpu_capability()
    said = {"calls": [name for name, *_ in chosen], "capability": capability}
    (folder / "calls.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
