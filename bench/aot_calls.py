"""Which Triton kernels the launchers ask for: recorded from real calls, nothing launched.

A call runs the launcher on CPU tensors whose memory is never touched, with the compute capability
of a GPU that need not be here, and every launch intercepted.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "vmtc_kernels.triton_kernels"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Call:
    """op(**arguments()). Calls that differ in nothing but ``sizes`` must share their kernels."""

    op: str
    kind: str
    # batch, tokens
    sizes: tuple[int, int]
    arguments: Callable[[], dict[str, Any]]

    @property
    def typical(self) -> bool:
        """In bfloat16, of the size that CLIP-L has, or a decoder with heads of 128."""
        sizes = ("=1024", "d=64", "decoder of 128")
        return self.kind.startswith("bf16") and any(size in self.kind for size in sizes)


@dataclass(frozen=True)
class Variant:
    """What triton compiles once: a kernel, the types and alignment of its arguments, options."""

    kernel: str
    # every argument: its type, and its value or alignment where the compiler is told
    arguments: tuple[tuple[str, str], ...]
    num_warps: int
    num_stages: int
    arch: int

    def __str__(self) -> str:
        said = [f"{name}={text}" for name, text in self.arguments]
        options = [f"num_warps={self.num_warps}", f"num_stages={self.num_stages}"]
        return f"{self.kernel}({', '.join(said + options)}) sm_{self.arch}"


@dataclass(frozen=True)
class Source:
    """A variant as triton.compile takes it."""

    function: JITFunction
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


def calls() -> list[Call]:
    return [*_importance(), *_kmeans(), *_merge_tokens(), *_focus()]


def _importance() -> Iterator[Call]:
    for name, dtype in DTYPES.items():
        for cls_index in (0, None):
            what = f"{name} {'received' if cls_index is None else 'cls'}"
            # float16 differs from bfloat16 in nothing but the names of instructions
            for d in (17, 64, 72, 80, 128, 256, 320) if name != "f16" else (64,):
                sizes = [(1, 577), (3, 50), (8, 1024), (64, 577), (256, 257)]
                for size in sizes if d in (17, 64) else sizes[:1]:
                    made = partial(_heads, *size, d, dtype, cls_index)
                    yield Call("token_importance", f"{what} d={d}", size, made)
            for size in [(1, 577), (8, 600)]:
                made = partial(_heads_of_one_product, *size, 64, dtype, cls_index)
                yield Call("token_importance", f"{what} one product, scale < 0", size, made)


def _heads(B: int, N: int, d: int, dtype: torch.dtype, cls_index: int | None) -> dict[str, Any]:
    q, k = (torch.empty(B, 16, N, d, dtype=dtype) for _ in range(2))
    return {"q": q, "k": k, "cls_index": cls_index}


def _heads_of_one_product(
    B: int, N: int, d: int, dtype: torch.dtype, cls_index: int | None
) -> dict[str, Any]:
    q, k, _ = torch.empty(B, N, 3, 16, d, dtype=dtype).permute(2, 0, 3, 1, 4)
    return {"q": q, "k": k, "cls_index": cls_index, "scale": -0.1}


# (batch, tokens) that a launcher clusters by all pairs of tokens, and by passes over them
SIZES = {
    "few tokens": [(1, 576), (3, 163), (8, 577), (64, 600), (256, 250)],
    "many tokens": [(1, 2880), (3, 3001), (8, 2880)],
}


def _clustering() -> Iterator[tuple[str, tuple[int, int], int, torch.dtype]]:
    """(kind, (B, N), D, dtype)"""
    for name, dtype in DTYPES.items():
        for which, sizes in SIZES.items():
            for D in (1024, 4096, 1000, 1001) if name != "f16" else (1024,):
                for size in sizes if D in (1024, 1001) else sizes[:1]:
                    yield f"{name} {which} D={D}", size, D, dtype


def _kmeans() -> Iterator[Call]:
    for kind, size, D, dtype in _clustering():
        for metric in ("cosine", "euclidean"):
            for has_valid in (False, True):
                made = partial(_tokens, *size, D, dtype, metric=metric, has_valid=has_valid)
                valid = " valid" if has_valid else ""
                yield Call("kmeans", f"{kind} {metric}{valid}", size, made)
    for name, dtype in DTYPES.items():
        for K in (5, 32):
            for metric in ("cosine", "euclidean"):
                made = partial(_tokens, 1, 2880, 1024, dtype, metric=metric, num_clusters=K)
                yield Call("kmeans", f"{name} many tokens D=1024 {metric} K={K}", (1, 2880), made)


def _tokens(
    B: int, N: int, D: int, dtype: torch.dtype, has_valid: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "x": torch.empty(B, N, D, dtype=dtype),
        "num_clusters": 32 if N < 1024 else 64,
        "iterations": 10 if N < 1024 else 3,
        "valid": torch.empty(B, N, dtype=torch.bool) if has_valid else None,
        **more,
    }


def _merge_tokens() -> Iterator[Call]:
    for kind, size, D, dtype in _clustering():
        for metric in ("cosine", "euclidean"):
            for weighting in ("score", "uniform"):
                made = partial(_scored, *size, D, dtype, metric=metric, weighting=weighting)
                yield Call("merge_tokens", f"{kind} {metric} {weighting}", size, made)
                if D == 1024 and size[0] == 3:
                    # that many primary tokens leave the sizes of the clusters unaligned
                    made = partial(made, num_primary=127)
                    yield Call("merge_tokens", f"{kind} {metric} {weighting}", size, made)
        if D == 1024:
            made = partial(_with_features, *size, D, dtype)
            yield Call("merge_tokens", f"{kind} valid, features", size, made)
            made = partial(_scored, *size, D, dtype, num_merged=0)
            yield Call("merge_tokens", f"{kind} prune", size, made)


def _scored(B: int, N: int, D: int, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    # behind the [CLS] token, as an encoder leaves them
    first = 1 if D == 1024 else 0
    return {
        "x": torch.empty(B, first + N, D, dtype=dtype)[:, first:],
        "scores": torch.empty(B, first + N)[:, first:],
        "num_primary": 128,
        "num_merged": 32 if N < 1024 else 64,
        "iterations": 10 if N < 1024 else 3,
        **more,
    }


def _with_features(B: int, N: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        **_scored(B, N, D, dtype),
        "scores": torch.empty(B, N, dtype=dtype),
        "features": torch.empty(B, N, 256, dtype=dtype),
        "valid": torch.empty(B, N, dtype=torch.bool),
    }


def _focus() -> Iterator[Call]:
    # (batch, positions) of prefill, of a part of it, and of decoding
    prefill, later = [(1, 675), (8, 675), (3, 1200), (32, 130)], [(1, 4096), (3, 677), (32, 1000)]
    for name, dtype in DTYPES.items():
        for d in (128, 64, 80, 17, 256) if name != "f16" else (128,):
            for queries, sizes in ((None, prefill), (1, later), (128, later)):
                when = {None: "prefill", 1: "decode", 128: "part"}[queries]
                for size in sizes if d == 128 else sizes[:1]:
                    made = partial(_pairs, *size, queries, d, dtype)
                    kind = f"{name} decoder of {d} {when}"
                    yield Call("masked_attention", kind, size, partial(made, masked=True))
                    yield Call("focus_scores", kind, size, partial(made, scored=True))
                    yield Call("focus_attention", kind, size, partial(made, scored=True, v=True))
                    if when != "prefill":
                        paged = partial(made, scored=True, v=True, page=16)
                        yield Call("paged_focus_attention", kind, size, paged)
        more = partial(_pairs, 1, 675, None, 128, dtype)
        kind = f"{name} decoder of 128"
        none = partial(more, masked=True, images=0)
        yield Call("masked_attention", f"{kind}, no mask", (1, 675), none)
        each = {"head_mode": "per_head", "aggregate": "residual", "renormalize": False}
        yield Call("focus_scores", f"{kind}, heads", (1, 675), partial(more, scored=True, **each))
        for images in (100, 576, 5000):
            for size in [(1, 700), (3, 6000)]:
                for rule in ({"keep_ratio": 0.5}, {"threshold": 0.5}):
                    made = partial(_selected, *size, images, dtype, **rule)
                    what = f"{name} decoder of 128 {images} images {next(iter(rule))}"
                    yield Call("focus_mask", what, size, made)


def _pairs(
    B: int,
    L: int,
    queries: int | None,
    d: int,
    dtype: torch.dtype,
    *,
    masked: bool = False,
    scored: bool = False,
    v: bool = False,
    page: int = 0,
    images: int = 576,
    **more: Any,
) -> dict[str, Any]:
    """32 heads of queries, 8 of keys; where scored and with v, what focus_attention takes."""
    Lq = L if queries is None else queries
    given: dict[str, Any] = {"q": torch.empty(B, 32, Lq, d, dtype=dtype)}
    shape = (B, 8, L, d) if not page else (B * (L // page + 1), page, 8, d)
    names = ("k_cache", "v_cache") if page else ("k", "v")
    for name in names if v or masked else names[:1]:
        given[name] = torch.empty(shape, dtype=dtype)
    if page:
        given["block_table"] = torch.empty(B, L // page + 1, dtype=torch.int32)
        given["seq_lens"] = torch.empty(B, dtype=torch.int32)
    given["modality"] = torch.empty(B, L, dtype=torch.uint8)
    if masked:
        given["mask"] = torch.empty(B, 1, Lq, images // 32, dtype=torch.int32)
    if scored:
        given["num_image"] = images
        if Lq < L:
            given["text_image"] = torch.empty(B, 1, L, images)
        if v:
            given["keep_ratio"] = 0.5
    return {**given, **more}


def _selected(B: int, L: int, images: int, dtype: torch.dtype, **rule: Any) -> dict[str, Any]:
    return {
        "scores": torch.empty(B, 1, 64, images, dtype=dtype),
        "modality": torch.empty(B, L, dtype=torch.uint8),
        **rule,
    }


def modules() -> list[ModuleType]:
    folder = importlib.import_module(PACKAGE).__path__
    return [importlib.import_module(f"{PACKAGE}.{m.name}") for m in pkgutil.iter_modules(folder)]


def kernels() -> set[str]:
    """All that can be launched: what is called by kernels alone has another name."""
    found = set()
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(_name(value))
    return found


def record(call: Call, arch: int) -> dict[Variant, Source]:
    """Every variant that the call launches or warms up on a GPU of that architecture."""
    found: dict[Variant, Source] = {}
    backend = make_backend(GPUTarget("cuda", arch, 32))

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constexprs, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        told = {
            p.name: _told(p.name, bound, s)
            for p, s in zip(self.params, specialization, strict=True)
        }
        variant = Variant(
            _name(self), tuple(told.items()), options.num_warps, options.num_stages, arch
        )
        found[variant] = Source(self, signature, constexprs, attributes, vars(options))

    with _on_a_gpu_of(arch, run):
        getattr(importlib.import_module(f"{PACKAGE}.{call.op}"), call.op)(**call.arguments())
    return found


def _name(function: JITFunction) -> str:
    return f"{function.fn.__module__.removeprefix(PACKAGE + '.')}.{function.fn.__name__}"


def _told(name: str, bound: dict[str, Any], specialization: tuple[str, Any]) -> str:
    kind, value = specialization
    if kind == "constexpr":
        return repr(bound[name])
    return f"{kind}:{value}" if isinstance(value, str) and value else kind


@contextlib.contextmanager
def _on_a_gpu_of(arch: int, run: Callable[..., None]) -> Iterator[None]:
    """Launches go to ``run``; the launchers see that GPU, and remember nothing of other calls."""
    launch = importlib.import_module(f"{PACKAGE}.launch")
    asked = launch.capability
    names = [m for m in modules() if getattr(m, "capability", None) is asked]
    memories = [v for m in modules() for v in vars(m).values() if isinstance(v, set)]
    kept = [set(memory) for memory in memories]
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory

    def capability(_: Tensor) -> tuple[int, int]:
        return arch // 10, arch % 10

    former = JITFunction.run
    try:
        JITFunction.run = run
        deterministic.fill_uninitialized_memory = False
        for module in names:
            module.capability = capability  # type: ignore[attr-defined]
        for memory in memories:
            memory.clear()
        yield
    finally:
        JITFunction.run = former
        deterministic.fill_uninitialized_memory = fill
        for module in names:
            module.capability = asked  # type: ignore[attr-defined]
        for memory, values in zip(memories, kept, strict=True):
            memory.clear()
            memory.update(values)
