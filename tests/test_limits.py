"""Where a kernel may go wrong unseen: beside its memory, beyond its grid, from run to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import queries_and_keys
from cases import FLOATS, array, assert_close, assert_same_bits, bits, device_of, normal, uniform
from clusters import assert_merged, assert_same_owners
from contract import each_tensor, results
from guards import GUARD, GuardedMemory
from sequences import attention_inputs, random_bits, sequences
from torch import Tensor
from work import CASES, Work, is_slow

import vmtc_kernels
from vmtc_kernels import (
    focus_attention,
    kmeans,
    masked_attention,
    merge_tokens,
    token_importance,
    use_backend,
)
from vmtc_kernels._registry import OPERATORS

AVAILABLE = vmtc_kernels.available_backends()


@pytest.fixture(params=list(CASES))
def work(request: pytest.FixtureRequest, backend: str) -> Work:
    return Work(backend, CASES[request.param])


def test_nothing_is_written_beside_a_tensor(
    backend: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        pytest.skip("it writes to no memory by itself")
    # the mode is Python's: worker threads that allocate would wait for one another
    torch.set_num_threads(1)
    implementations = OPERATORS[work.op].implementations
    kernel, memories = implementations[backend], []

    def guarded(*args: Any, **kwargs: Any) -> Any:
        memories.append(GuardedMemory())
        with memories[-1]:
            return kernel(*args, **kwargs)

    for dtype in FLOATS:
        arguments = work.inputs(3, dtype)
        # rows of a state are written; by a second call as by the first
        before = {
            k: v.clone()
            for k, v in arguments.items()
            if isinstance(v, Tensor) and k != "text_image"
        }
        expected = work.run(arguments)
        with monkeypatch.context() as patch:
            patch.setitem(implementations, backend, guarded)
            got = work.run(arguments)
        assert_same_bits(got, expected)
        assert memories[-1].check() >= len(got)
        assert_same_bits(tuple(arguments[name] for name in before), tuple(before.values()))


@pytest.mark.parametrize("place", [-1, 0])
def test_the_guards_notice(place: int) -> None:
    with GuardedMemory() as memory:
        tensor = torch.zeros(3, 4)
        other = torch.empty(5)
    assert memory.check() == 2 and (tensor == 0).all() and other.isnan().all()
    start = GUARD // 4 + (place if place else 12)
    torch.empty(0).set_(tensor.untyped_storage())[start] = 1.0
    with pytest.raises(AssertionError, match="before" if place else "behind"):
        memory.check()


def test_the_same_bits_on_twenty_runs(backend: str, work: Work) -> None:
    arguments = work.inputs(5)
    expected = work.run(arguments)
    for i in range(3 if is_slow(backend) else 20):
        # other memory each time
        taken = torch.empty(1000 * i + 1)
        assert_same_bits(work.run(arguments), expected)
        del taken


TOKENS = {
    "usual": (41, 8, 5),
    "zero batch": (41, 8, 5),
    "NaN and Inf": (41, 8, 5),
    "identical": (41, 8, 5),
    "one valid": (41, 8, 5),
    "as many slots as tokens": (41, 30, 11),
}


@pytest.mark.parametrize("what", TOKENS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_edges(backend: str, dtype: torch.dtype, what: str) -> None:
    N, P, K = TOKENS[what]
    B = 0 if what == "zero batch" else 2
    x, scores, valid = normal(B, N, 48, dtype=dtype), uniform(B, N), None
    if what == "NaN and Inf":
        x[:, 3:30:4, 5], x[1, 20] = torch.nan, torch.inf
    if what == "identical":
        x[:] = x[:1, :1].clone()
    if what == "one valid":
        valid = (torch.arange(N) == 7).expand(B, N)
    for metric in ("cosine", "euclidean"):
        got = merge_tokens(x, scores, P, K, metric=metric, valid=valid)
        with use_backend("reference"):
            expected = merge_tokens(x, scores, P, K, metric=metric, valid=valid)
        assert torch.equal(got.owner, expected.owner) and torch.equal(got.sizes, expected.sizes)
        assert_merged(got, x, scores, P, K, valid=valid)
        assert_same_owners(got, x, scores, P, K, 10, metric, valid)
        clustered = kmeans(x, K, metric=metric, valid=valid)
        with use_backend("reference"):
            other = kmeans(x, K, metric=metric, valid=valid)
        assert torch.equal(clustered.labels, other.labels)
        assert_close(clustered.centroids, other.centroids)


def points(*shape: int) -> Tensor:
    """Small integers: distances are exact and ties too."""
    return (8 * normal(*shape)).round().clamp(-20, 20)


# a dimension that becomes a grid's must not end where a grid's y and z do, at 65535
MANY: dict[str, Callable[[int], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "heads": lambda n: (token_importance, queries_and_keys(1, n, 3, 4)),
    "keys": lambda n: (token_importance, queries_and_keys(1, 1, 16 * n, 4)),
    "tokens": lambda n: (
        kmeans,
        {"x": points(1, 16 * n, 2), "num_clusters": 3, "iterations": 0, "metric": "euclidean"},
    ),
    "clusters": lambda n: (
        kmeans,
        {
            "x": torch.stack([torch.arange(n) // 41**i % 41 for i in range(3)], -1).float()[None],
            "num_clusters": n - n // 16,
            "iterations": 0,
            "metric": "euclidean",
        },
    ),
    "attention heads": lambda n: (
        focus_attention,
        {**attention_inputs(1, n, 1, 4, 4), "num_image": 2, "keep_ratio": 0.5},
    ),
    "decoded keys": lambda n: (
        focus_attention,
        {
            **attention_inputs(1, 2, 1, 4 * n, 4, queries=1),
            "num_image": 16,
            "keep_ratio": 0.5,
            "text_image": uniform(1, 1, 4 * n, 16),
        },
    ),
    "primary": lambda n: (
        merge_tokens,
        {"x": points(1, n + 9, 2), "scores": uniform(1, n + 9), "num_primary": n, "num_merged": 0},
    ),
    "features": lambda n: (
        merge_tokens,
        {"x": normal(1, 9, 16 * n), "scores": uniform(1, 9), "num_primary": 2, "num_merged": 3},
    ),
}


@pytest.mark.parametrize("what", MANY)
def test_more_of_something_than_a_grid_has_places(backend: str, what: str) -> None:
    small = is_slow(backend) or (backend == "cpu" and what == "clusters")
    op, arguments = MANY[what](70 if small else 70_000)
    if backend not in OPERATORS[op.__name__].implementations:
        pytest.skip(f"{op.__name__} has no {backend} kernel")
    got = results(op(**arguments))
    # C++ is fast enough for all of it
    oracle = "reference" if backend == "cpu" or AVAILABLE["cpu"] else "cpu"
    with use_backend(oracle):
        expected = results(op(**each_tensor(arguments, lambda t: t.cpu())))
    for one, other in zip(got, expected, strict=True):
        if one.is_floating_point():
            # the mean of 70,000 heads
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("name", list(CASES))
def test_a_batch_beyond_a_grid(backend: str, name: str) -> None:
    op, make = CASES[name]
    if backend not in OPERATORS[op].implementations:
        pytest.skip(f"{op} has no {backend} kernel")
    arguments, repeats = make(7, 12, torch.float32, 0), 2 if is_slow(backend) else 10_000
    run = getattr(vmtc_kernels, op)
    few = results(run(**arguments))
    many = each_tensor(arguments, lambda t: t.repeat(repeats, *[1] * (t.dim() - 1)))
    for one, other in zip(results(run(**many)), few, strict=True):
        assert torch.equal(
            bits(one).view(repeats, *other.shape), bits(other).expand(repeats, *other.shape)
        )


FAR = 2**31 + 64


# as euclidean distances of integers are exact, labels do not depend on the strides
FAR_CALLS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "merge_tokens": lambda x: merge_tokens(x, uniform(*x.shape[:2]), 2, 3, metric="euclidean"),
    "kmeans": lambda x: kmeans(x, 3, metric="euclidean", iterations=2),
    "token_importance": lambda x: tuple(
        token_importance(x[:, None], x[:, None], cls_index=cls_index) for cls_index in (3, None)
    ),
    "masked_attention": lambda x: masked_attention(
        *(x[:, None],) * 3, sequences(*x.shape[:2]), random_bits(x.shape[0], 1, x.shape[1], 1)
    ),
    "focus_attention": lambda x: (
        focus_attention(*(x[:, None],) * 3, sequences(*x.shape[:2]), 6, keep_ratio=0.5),
    ),
}


@pytest.mark.parametrize("op", FAR_CALLS)
@pytest.mark.parametrize("layout", ["images", "tokens"])
def test_strides_beyond_32_bits(backend: str, op: str, layout: str, tmp_path: Path) -> None:
    """The tensors are small; what lies between their parts is not touched."""
    if backend not in OPERATORS[op].implementations:
        pytest.skip(f"{op} has no {backend} kernel")
    stored = {"images": (2, 6, 16), "tokens": (1, 12, 16)}[layout]
    strides = {"images": (FAR, 16, 1), "tokens": (16, FAR // 8, 1)}[layout]
    length = 1 + sum((n - 1) * step for n, step in zip(stored, strides, strict=True))
    if device_of(backend) == "cuda":
        if torch.cuda.mem_get_info()[0] < 2.2 * length + 2**28:
            pytest.skip("too little memory")
        storage = torch.empty(length, dtype=torch.bfloat16)
    else:
        # a file with a hole takes no memory
        file = str(tmp_path / "far")
        storage = torch.from_file(file, shared=True, size=length, dtype=torch.bfloat16)
    near, far = points(*stored).bfloat16(), storage.as_strided(stored, strides)
    far.copy_(near)
    for got, want in zip(FAR_CALLS[op](far), FAR_CALLS[op](near), strict=True):
        assert_close(got, want.float().cpu().numpy() if want.is_floating_point() else array(want))
