"""Fixtures for every test: one backend at a time, uninitialised memory poisoned, fixed seeds."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # before torch: processes that all take every processor wait for one another, ten times as long
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch
from hypothesis import HealthCheck, settings

import vmtc_kernels

# before their first import, so that a failed assert of theirs shows its values too
pytest.register_assert_rewrite("cases", "clusters", "contract")

from cases import BACKENDS, device_of  # noqa: E402

if "triton" in BACKENDS and device_of("triton") == "cpu":
    import interpreter

    interpreter.patch_language_once()
    interpreter.sort_by_numpy()

settings.register_profile(
    "vmtc",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vmtc")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    yield
    # after an illegal access every call fails: another process goes on, where one would take over
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU is lost to this process: {error}", file=sys.stderr, flush=True)
            os._exit(70)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every fresh tensor, also of C++ kernels, holds NaN, the largest integer or True."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same seeds, threads and automatic choice of backend at the start of every test."""
    monkeypatch.delenv("VMTC_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with vmtc_kernels.use_backend(None):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, same_start: None) -> Iterator[str]:
    """Each backend that can run here, forced, so that none silently falls back to another."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernel(request: pytest.FixtureRequest, same_start: None) -> Iterator[str]:
    """`backend` without the reference, of which less is promised."""
    with forced(request.param):
        yield request.param


@contextmanager
def forced(name: str) -> Iterator[None]:
    """The backend, and its device as that of new tensors."""
    former = torch.get_default_device()
    if device_of(name) != former.type:
        torch.set_default_device(device_of(name))
    if name == "reference":
        # its many small steps only wait for one another on a busy machine
        torch.set_num_threads(1)
    with vmtc_kernels.use_backend(name):
        yield
    if torch.get_default_device() != former:
        torch.set_default_device(None)
