"""What the tests share: backends, inputs, tolerances and comparisons."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vmtc_kernels
from vmtc_kernels import _registry

# what runs here; test_registry.py fails where the compiled module should be among them and is not
BACKENDS = [name for name, missing in vmtc_kernels.available_backends().items() if not missing]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
METRICS = ("euclidean", "cosine")
WEIGHTINGS = ("score", "uniform")

# largest error and root mean square error, in epsilons of the dtype: float32 results are sums of
# up to some hundred terms, the others are such sums rounded once
TOLERANCES = {
    torch.float64: (512, 64),
    torch.float32: (64, 8),
    torch.float16: (1, 0.5),
    torch.bfloat16: (1, 0.5),
}


def device_of(backend: str) -> str:
    """Where a backend runs: Triton's interpreter and emulated CUDA work on CPU tensors."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    emulated = backend == "cuda" and _registry._emulated
    return "cpu" if backend in ("reference", "cpu") or interpreted or emulated else "cuda"


def is_simulated(backend: str) -> bool:
    """A kernel for a GPU on a CPU: each thread or instruction by itself, which is slow."""
    return backend in ("triton", "cuda") and device_of(backend) == "cpu"


def some(backend: str, batch: int) -> int:
    """Of a batch whose sequences have different layouts, three where each takes a second."""
    return min(batch, 3) if is_simulated(backend) else batch


def place(value: Tensor) -> Tensor:
    return value.to(torch.get_default_device())


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return place(torch.randn(shape, generator=generator, device="cpu").to(dtype))


def uniform(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers in [0, 1) on every device."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return place(torch.rand(shape, generator=generator, device="cpu").to(dtype))


def ragged(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """A mask with gaps; of five images one has no valid token and one a single one."""
    valid = uniform(batch, tokens, seed=seed) < 0.7
    valid[3::5] = False
    valid[4::5] = False
    valid[4::5, tokens // 2 : tokens // 2 + 1] = True
    return valid


def strided(value: Tensor) -> dict[str, Tensor]:
    """Non-contiguous tensors that equal ``value``; what lies between their elements is garbage."""
    garbage = torch.nan if value.is_floating_point() else 1
    step = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), garbage, dtype=value.dtype)
    step[..., 1::2] = value
    rows = torch.full((value.shape[0], value.shape[1] + 3, *value.shape[2:]), garbage).to(value)
    rows[:, 2:-1] = value
    return {
        "transposed": value.transpose(0, -1).contiguous().transpose(0, -1),
        "inner": value.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every second": step[..., 1::2],
        "slice of rows": rows[:, 2:-1],
    }


def array(value: Tensor) -> np.ndarray:
    """As NumPy, floats in float64."""
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def bits(value: Tensor) -> Tensor:
    """As integers, so that NaN equals itself, its payload counts and so does the sign of zero."""
    if not value.is_floating_point():
        return value.cpu()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().cpu().view(integers[value.element_size()])


def assert_same_bits(got: Any, expected: Any) -> None:
    """Tensors, or tuples of them, that are equal bit for bit."""
    if isinstance(got, Tensor):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(bits(got), bits(expected))
        return
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


def assert_close(got: Tensor, expected: Tensor | np.ndarray) -> None:
    """Equal within `TOLERANCES`, relative to the largest value and to the root mean square.

    What is not finite must be so on both sides; integers must be equal.
    """
    expected = expected if isinstance(expected, np.ndarray) else array(expected)
    values = array(got)
    assert values.shape == expected.shape
    if not got.is_floating_point():
        assert np.array_equal(values, expected)
        return
    finite = np.isfinite(expected)
    assert np.array_equal(np.isfinite(values), finite), "not finite in other places"
    error, scale = np.abs(values[finite] - expected[finite]), np.abs(expected[finite])
    if error.size == 0:
        return
    epsilon, tiny = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).tiny
    largest, rms = TOLERANCES[got.dtype]
    assert error.max() <= largest * epsilon * scale.max() + tiny, (error.max(), scale.max())
    mean, mean_scale = np.sqrt((error**2).mean()), np.sqrt((scale**2).mean())
    assert mean <= rms * epsilon * mean_scale + tiny, (mean, mean_scale)


def assert_same_clustering(
    labels: Tensor, expected: list[oracle.Clustering], *, exactly: bool | None = None
) -> None:
    """Labels [B, N] are those of the oracle.

    Exactly so where the oracle met no near tie (`oracle.near_tie`) on its way, or if ``exactly``.
    After one, at most 2% of an image's tokens (at least one) may differ, and either each of them
    was itself at a near tie in the last assignment, or the objective is the same up to 1e-5.
    """
    for row, image in zip(array(labels), expected, strict=True):
        assert np.array_equal(row >= 0, image.labels >= 0), "wrong tokens are labelled"
        differ = np.flatnonzero(row != image.labels)
        if len(differ) == 0:
            continue
        assert not (image.clear if exactly is None else exactly), f"{len(differ)} labels differ"
        allowed = max(1, int(0.02 * (row >= 0).sum()))
        assert len(differ) <= allowed, f"{len(differ)} labels differ, at most {allowed} may"
        if not image.near_ties(differ, row[differ]).all():
            assert_same_objective(row, image)


def assert_same_objective(labels: np.ndarray, image: oracle.Clustering) -> None:
    """The sum of distances to the centroids of these labels [N] is the oracle's up to 1e-5."""
    got, best = image.objective(labels), image.objective(image.labels)
    assert abs(got - best) <= 1e-5 * best + image.rounding, (got, best)


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of tensors allocated at once during a call, its results among them."""
    if torch.get_default_device().type == "cuda":
        # cuBLAS takes 32 MB for itself at its first call of a thread
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
