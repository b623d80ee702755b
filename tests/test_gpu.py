"""What only a GPU can show: graphs, streams, waiting, large addresses, compilation."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from contract import each_tensor, results
from torch import Tensor
from work import CASES, Work

import vmtc_kernels
from vmtc_kernels import focus_attention, kmeans, merge_tokens, token_importance, use_backend

GPU_BACKENDS = ("triton", "cuda")
AVAILABLE = vmtc_kernels.available_backends()


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest, same_start: None) -> Iterator[str]:
    """Each backend on the GPU, forced; skipped with the reason where it cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if AVAILABLE[request.param]:
        pytest.skip(f"{request.param}: {AVAILABLE[request.param]}")
    torch.set_default_device("cuda")
    with use_backend(request.param):
        yield request.param
    torch.set_default_device(None)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture(params=list(CASES))
def on_gpu(request: pytest.FixtureRequest, gpu_backend: str) -> Work:
    return Work(gpu_backend, CASES[request.param])


def overwrite(arguments: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value.copy_(new[name])


def test_a_captured_graph_serves_new_inputs(on_gpu: Work) -> None:
    inputs = [on_gpu.inputs(seed, torch.bfloat16) for seed in range(3)]
    expected = [on_gpu.run(arguments) for arguments in inputs]
    static = each_tensor(inputs[0], torch.clone)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_gpu.run(static)
    for i in (0, 1, 2, 1):
        overwrite(static, inputs[i])
        graph.replay()
        assert_same_bits(got, expected[i])


@pytest.mark.parametrize("case", list(CASES))
def test_a_graph_can_be_of_a_batch_never_seen(gpu_backend: str, case: str) -> None:
    """It may take another tile or form, which must be loaded by then."""
    op, make = CASES[case]
    run = getattr(vmtc_kernels, op)
    run(**make(1, 100, torch.bfloat16, 0))
    arguments = make(70, 101, torch.bfloat16, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(run(**arguments))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(got, results(run(**arguments)))


def test_runs_on_the_current_stream_and_after_what_is_there(on_gpu: Work) -> None:
    old, new = on_gpu.inputs(0), on_gpu.inputs(1)
    expected = on_gpu.run(new)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # what does not wait for it sees the old inputs
        torch.cuda._sleep(100_000_000)
        overwrite(old, new)
        got = on_gpu.run(old)
    stream.synchronize()
    assert_same_bits(got, expected)


def test_several_streams_at_once(on_gpu: Work) -> None:
    inputs = [on_gpu.inputs(seed, torch.float16) for seed in range(4)]
    expected = [on_gpu.run(arguments) for arguments in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = []
    for _ in range(5):
        for stream, arguments in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(on_gpu.run(arguments))
    torch.cuda.synchronize()
    for i, value in enumerate(got):
        assert_same_bits(value, expected[i % len(inputs)])


def test_never_waits_for_the_gpu(on_gpu: Work) -> None:
    arguments = on_gpu.inputs(0)
    # the first call compiles and loads, which may wait
    expected = on_gpu.run(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = on_gpu.run(arguments)
        # torch sees only its own: the launch of all that follows this pause must not last as long
        torch.cuda._sleep(400_000_000)
        paused = torch.cuda.Event()
        paused.record()
        on_gpu.run(arguments)
        assert not paused.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_runs_on_the_gpu_that_holds_the_tensors(on_gpu: Work) -> None:
    arguments = on_gpu.inputs(0)
    expected = on_gpu.run(arguments)
    got = on_gpu.run(each_tensor(arguments, lambda t: t.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in got)
    assert_same_bits(got, expected)


def random(*shape: int) -> Tensor:
    """Drawn on the GPU: so many numbers would take a processor minutes."""
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)


def modality(batch: int, length: int) -> Tensor:
    """Text around one image of 64 tokens."""
    kinds = torch.ones(batch, length, dtype=torch.uint8)
    kinds[:, 20:84] = 2
    return kinds


# more than 2^31 elements in the input, in the tokens that come out, or in all pairs of tokens
LARGE: dict[str, tuple[int, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]]] = {
    "merge_tokens": (
        20,
        lambda: (
            merge_tokens,
            {
                "x": (x := random(1100, 512, 4096)),
                "scores": x[:, :, 0].float(),
                "num_primary": 128,
                "num_merged": 16,
                "iterations": 2,
            },
        ),
    ),
    "merge_tokens, prune": (
        20,
        lambda: (
            merge_tokens,
            {
                "x": (x := random(1100, 512, 4096)),
                "scores": x[:, :, 0].float(),
                "num_primary": 512,
                "num_merged": 0,
            },
        ),
    ),
    "merge_tokens, all pairs": (
        30,
        lambda: (
            merge_tokens,
            {
                "x": (x := random(2800, 900, 256)),
                "scores": x[:, :, 0].float(),
                "num_primary": 0,
                "num_merged": 40,
            },
        ),
    ),
    "kmeans": (
        25,
        lambda: (
            kmeans,
            {"x": random(70, 32768, 1024), "num_clusters": 8, "iterations": 1},
        ),
    ),
    "token_importance": (
        20,
        lambda: (token_importance, {"q": (q := random(2100, 16, 1024, 64)), "k": q.roll(1, 0)}),
    ),
    "token_importance, received": (
        20,
        lambda: (
            token_importance,
            {"q": (q := random(2100, 16, 1024, 64)), "k": q.roll(1, 0), "cls_index": None},
        ),
    ),
    "focus_attention": (
        30,
        lambda: (
            focus_attention,
            {
                "q": (q := random(2100, 8, 1024, 128)),
                "k": q.roll(1, 0),
                "v": q,
                "modality": modality(2100, 1024),
                "num_image": 64,
                "keep_ratio": 0.5,
            },
        ),
    ),
    "focus_attention, decode": (
        20,
        lambda: (
            focus_attention,
            {
                "q": random(300, 32, 1, 128),
                "k": (k := random(300, 8, 8192, 128)),
                "v": k,
                "modality": modality(300, 8192),
                "num_image": 64,
                "keep_ratio": 0.5,
                "text_image": torch.rand(300, 1, 8192, 64),
            },
        ),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_31_elements(gpu_backend: str, name: str) -> None:
    gigabytes, make = LARGE[name]
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")
    # filling fresh memory once more costs more than the test
    torch.utils.deterministic.fill_uninitialized_memory = False
    op, arguments = make()
    largest = max(v.numel() for v in arguments.values() if isinstance(v, Tensor))
    assert largest > 2**31 or "pairs" in name
    got = results(op(**arguments))
    for b in (0, len(got[0]) // 2, len(got[0]) - 1):
        # an image does not depend on its batch, and alone it is small
        alone = results(op(**each_tensor(arguments, lambda t, b=b: t[b : b + 1].clone())))
        assert_same_bits(tuple(value[b : b + 1] for value in got), alone)


def compiled_variants() -> dict[str, int]:
    """How many binaries each Triton kernel of the package has been compiled to."""
    import triton

    package = importlib.import_module("vmtc_kernels.triton_kernels")
    counts = {}
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        for name, kernel in members.items():
            if isinstance(kernel, triton.runtime.JITFunction):
                caches = kernel.device_caches.values()
                counts[f"{kernel.__module__}.{name}"] = sum(len(cache[0]) for cache in caches)
    return counts


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("gpu_backend", ["triton"], indirect=True)
def test_no_compilation_for_a_new_size(gpu_backend: str, case: str) -> None:
    op, make = CASES[case]
    run = getattr(vmtc_kernels, op)
    run(**make(3, 100, torch.bfloat16, 0))
    before = compiled_variants()
    assert sum(before.values()) > 0, "the caches of Triton are elsewhere"
    # 1 and the multiples of 16 are what Triton compiles anew for by itself
    for batch, tokens in ((1, 100), (2, 97), (16, 112), (5, 128), (64, 101)):
        run(**make(batch, tokens, torch.bfloat16, 0))
    assert compiled_variants() == before


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, vmtc_kernels as v
device = "cuda" if torch.cuda.is_available() else "cpu"
x, scores = torch.randn(2, 40, 16, device=device), torch.rand(2, 40, device=device)
told = v.explain("merge_tokens", x, scores, 8, 4)
got = v.merge_tokens(x, scores, 8, 4)
assert got.sizes.sum() == 80
print(told.backend, "|", told.reasons["triton"])
"""


def test_without_triton_another_backend_serves() -> None:
    """On a GPU the CUDA kernels, if they were compiled; else the reference, or the CPU's."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(vmtc_kernels.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", WITHOUT_TRITON]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    backend, reason = run.stdout.strip().split(" | ")
    order = ("cuda", "reference") if torch.cuda.is_available() else ("cpu", "reference")
    assert backend == next(name for name in order if not AVAILABLE[name])
    assert reason == "triton is not installed"
