"""The choice of a backend: automatic, forced, refused and explained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS

import vmtc_kernels
from vmtc_kernels import (
    BackendError,
    Explanation,
    _registry,
    available_backends,
    explain,
    kmeans,
    merge_tokens,
    select_random,
    select_strided,
    spatial_downsample,
    token_importance,
    use_backend,
)
from vmtc_kernels.kmeans import reference as kmeans_reference

X, S, Q = torch.randn(2, 12, 4), torch.rand(2, 12), torch.randn(2, 3, 12, 4)
CALLS: dict[Any, tuple[Any, ...]] = {
    kmeans: (X, 3),
    merge_tokens: (X, S, 3, 2),
    select_random: (X, 3),
    select_strided: (X, 3),
    spatial_downsample: (X, [3, 4], 2),
    token_importance: (Q, Q),
}
EACH = pytest.mark.parametrize(
    ("run", "args"), CALLS.items(), ids=lambda v: getattr(v, "__name__", "")
)
MISSING = {name: reason for name, reason in available_backends().items() if reason}
needs_compiled = pytest.mark.skipif("cpu" in MISSING, reason="the compiled module is not built")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process that can import the package and nothing of the tests."""
    root = str(Path(vmtc_kernels.__file__).parent.parent)
    env = {k: v for k, v in os.environ.items() if k != "VMTC_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)


def test_compiled_module_is_built() -> None:
    """Without it the other tests would pass and test nothing of C++. VMTC_BUILD=none means that."""
    if os.environ.get("VMTC_BUILD") != "none":
        assert available_backends()["cpu"] is None


def test_every_backend_is_listed_with_its_reason() -> None:
    backends = available_backends()
    assert list(backends) == ["cuda", "triton", "cpu", "reference"]
    assert backends["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in backends.values())


@EACH
def test_every_operator_runs_on_every_backend(backend: str, run: Any, args: tuple) -> None:
    assert explain(run, *args).backend == backend
    run(*args)


@EACH
def test_the_first_backend_that_can_run_is_chosen(run: Any, args: tuple) -> None:
    on_cpu = [name for name in BACKENDS if name in ("cpu", "reference")]
    chosen = explain(run, *args)
    assert chosen.backend == on_cpu[0]
    for name in on_cpu[1:]:
        assert chosen.reasons[name] == f"can run, but {on_cpu[0]} comes first"
    assert set(chosen.reasons) == set(available_backends()) - {chosen.backend}
    for name in MISSING:
        assert chosen.reasons[name] == MISSING[name]


@EACH
def test_float64_is_for_the_reference(run: Any, args: tuple) -> None:
    double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    found = explain(run, *double)
    assert found.backend == "reference"
    if "cpu" not in MISSING:
        assert "float32, float16 and bfloat16, got float64" in found.reasons["cpu"]


@needs_compiled
def test_a_forced_backend_that_cannot_run_raises_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "kmeans: backend 'cpu' was forced but cannot run: .* got float64"
    with use_backend("cpu"), pytest.raises(BackendError, match=reason):
        kmeans(X.double(), 3)
    monkeypatch.setenv("VMTC_BACKEND", "cpu")
    with pytest.raises(BackendError, match=reason):
        kmeans(X.double(), 3)
    with pytest.raises(BackendError, match=reason):
        torch.ops.vmtc.kmeans(X.double(), 3)
    with pytest.raises(BackendError, match=r"merge_tokens: .* got float64"):
        merge_tokens(X, S.double(), 3, 2)
    with pytest.raises(BackendError, match=r"merge_tokens: .* got float64"):
        merge_tokens(X, S, 3, 2, features=X.double())
    with pytest.raises(BackendError, match=reason):
        explain(kmeans, X.double(), 3)
    assert explain(kmeans, X, 3).backend == "cpu"


@EACH
@pytest.mark.parametrize("name", MISSING)
def test_a_forced_backend_that_is_missing_raises_the_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, run: Any, args: tuple
) -> None:
    monkeypatch.setenv("VMTC_BACKEND", name)
    with pytest.raises(BackendError) as error:
        run(*args)
    expected = f"{run.__name__}: backend {name!r} was forced but cannot run: {MISSING[name]}"
    assert str(error.value) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_reasons_without_a_gpu() -> None:
    pytest.importorskip("triton")
    code = "import vmtc_kernels as v; print(v.available_backends())"
    reasons = eval(python(code, TRITON_INTERPRET="").stdout)
    assert reasons["triton"] == (
        "torch finds no CUDA device (with TRITON_INTERPRET=1 it runs on CPU tensors)"
    )
    assert reasons["cuda"] == "the compiled module was built without CUDA (VMTC_BUILD=cpu)"
    assert eval(python(code, TRITON_INTERPRET="1").stdout)["triton"] is None


def test_old_or_missing_triton_is_named() -> None:
    code = (
        "import vmtc_kernels as v, importlib.util as u, importlib.machinery as m, sys, types\n"
        "triton = sys.modules['triton'] = types.ModuleType('triton')\n"
        "triton.__spec__, triton.__version__ = m.ModuleSpec('triton', None), '3.5.1'\n"
        "print(v.available_backends()['triton'])"
    )
    assert python(code).stdout.strip() == "it needs triton 3.6 or newer, found 3.5.1"
    absent = code.replace("print", "u.find_spec = lambda name: None; print")
    assert python(absent).stdout.strip() == "triton is not installed"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that believes in a GPU of compute capability 9.0 with both kernels."""
    monkeypatch.setattr(_registry, "_missing", lambda name: None)
    monkeypatch.setattr(_registry, "_capability_of", lambda *_: (9, 0))
    monkeypatch.setattr(_registry, "_interpreted", True)
    monkeypatch.setattr(_registry, "_emulated", True)
    operator = _registry.OPERATORS["kmeans"]
    kernels = {name: lambda *a, name=name: name for name in vmtc_kernels.available_backends()}
    monkeypatch.setattr(operator, "implementations", kernels)
    monkeypatch.setattr(operator, "broken", {})


@pytest.mark.parametrize("first", ["cuda", "triton"])
def test_an_operator_prefers_cuda_or_triton(
    gpu: None, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    operator = _registry.OPERATORS["kmeans"]
    monkeypatch.setattr(operator, "prefer", lambda capability, *_: (first, f"of {capability}"))
    found = explain(kmeans, X, 3)
    assert found.backend == first
    other = "triton" if first == "cuda" else "cuda"
    assert found.reasons[other] == f"can run, but {first} comes first: of (9, 0)"


def test_a_triton_kernel_that_does_not_compile_gives_way(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PTXASError(Exception):
        __module__ = "triton.runtime.errors"

    def fails(*args: Any) -> None:
        raise PTXASError("ptxas fatal\nand more")

    operator = _registry.OPERATORS["kmeans"]
    monkeypatch.setitem(operator.implementations, "triton", fails)
    monkeypatch.setitem(operator.implementations, "cuda", kmeans_reference)
    monkeypatch.setattr(operator, "prefer", lambda *_: ("triton", "it is named first"))
    assert kmeans(X, 3).sizes.sum() == 24
    found = explain(kmeans, X, 3)
    assert found.backend == "cuda"
    assert found.reasons["triton"] == "its kernel does not compile: PTXASError: ptxas fatal"
    with use_backend("triton"), pytest.raises(BackendError, match="does not compile: PTXASError"):
        kmeans(X, 3)


def test_an_error_that_is_not_of_compiling_is_raised(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError

    operator = _registry.OPERATORS["kmeans"]
    monkeypatch.setitem(operator.implementations, "triton", fails)
    monkeypatch.setattr(operator, "prefer", lambda *_: ("triton", ""))
    with pytest.raises(ZeroDivisionError):
        kmeans(X, 3)


def test_old_gpus_are_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_capability_of", lambda *_: (7, 0))
    reasons = explain(kmeans, X, 3).reasons
    assert reasons["triton"] == ("the triton kernel needs compute capability 8.0, this GPU has 7.0")
    assert "needs compute capability 7.5" in reasons["cuda"]


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMTC_BACKEND", "reference")
    found = explain("kmeans", X, 3)
    assert found.backend == "reference"
    assert found.reasons["cpu"] == MISSING.get("cpu", "can run, but reference is forced")
    monkeypatch.setenv("VMTC_BACKEND", "")
    assert explain("kmeans", X, 3).backend == BACKENDS[-2 if "cpu" not in MISSING else -1]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = r"backend must be one of \['cuda', 'triton', 'cpu', 'reference'\], got 'gpu'"
    with pytest.raises(ValueError, match=f"use_backend: {listed}"):
        use_backend("gpu")
    monkeypatch.setenv("VMTC_BACKEND", "gpu")
    for call in (lambda: kmeans(X, 3), lambda: explain("kmeans", X, 3)):
        with pytest.raises(ValueError, match=f"VMTC_BACKEND: {listed}"):
            call()


def forced() -> str:
    """The forced backend as a refused or explained call tells it, or 'none'."""
    try:
        reasons = explain("kmeans", X, 3).reasons.values()
    except BackendError as error:
        return str(error).split("'")[1]
    return "reference" if "can run, but reference is forced" in reasons else "none"


def test_use_backend_nests_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("cuda"):
        assert forced() == "cuda"
        with use_backend("triton"):
            assert forced() == "triton"
            with pytest.raises(ValueError), use_backend("gpu"):
                pass
            assert forced() == "triton"
            with use_backend(None):
                assert forced() == "none"
        assert forced() == "cuda"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert forced() == "cuda"
    assert forced() == "none"


def test_use_backend_as_a_call_lasts() -> None:
    use_backend("cuda")
    assert forced() == "cuda"
    use_backend("triton")
    assert forced() == "triton"
    use_backend(None)
    assert forced() == "none"


def test_use_backend_is_stronger_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMTC_BACKEND", "cuda")
    assert forced() == "cuda"
    with use_backend("triton"):
        assert forced() == "triton"
    assert forced() == "cuda"


@EACH
def test_explain_takes_a_name_a_function_or_an_operator(run: Any, args: tuple) -> None:
    name = run.__name__
    packet = getattr(torch.ops.vmtc, name)
    expected = explain(name, *args)
    assert isinstance(expected, Explanation) and expected.op == name
    for op in (run, packet, packet.default, f"vmtc::{name}"):
        assert explain(op, *args) == expected


def test_explanation_reads_as_a_table() -> None:
    lines = str(explain(kmeans, X, num_clusters=3)).splitlines()
    assert lines[0] == f"kmeans: {explain('kmeans', X, 3).backend}"
    assert [line.split()[0] for line in lines[1:]] == list(explain("kmeans", X, 3).reasons)
    for name, reason in MISSING.items():
        assert f"  {name:<9}  {reason}" in lines


def test_explain_refuses_what_is_not_an_operator() -> None:
    listed = "explain: op must be one of .*'kmeans', 'masked_attention', 'merge_tokens'.*, got"
    for op, got in [("meanshift", "'meanshift'"), (torch.relu, "'relu'"), (3, "'3'")]:
        with pytest.raises(ValueError, match=f"{listed} {got}"):
            explain(op, X)


def test_explain_checks_the_arguments() -> None:
    with pytest.raises(ValueError, match="num_clusters must be at least 1, got 0"):
        explain("kmeans", X, 0)
    with pytest.raises(TypeError, match=r"x must be a tensor \[B, N, D\], got list"):
        explain("kmeans", [1.0], 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_importing_the_package_is_enough(backend: str) -> None:
    code = (
        "import vmtc_kernels, torch\n"
        "tokens, owner, sizes = torch.ops.vmtc.merge_tokens(\n"
        "    torch.randn(2, 576, 16), torch.rand(2, 576), 128, 32)\n"
        "assert tokens.shape == (2, 160, 16) and sizes.sum() == 2 * 576\n"
        "print(vmtc_kernels.__version__)"
    )
    done = python(code, VMTC_BACKEND=backend)
    assert (done.returncode, done.stdout.strip()) == (0, vmtc_kernels.__version__), done.stderr


def test_the_reference_serves_without_the_compiled_module() -> None:
    code = (
        "import sys; sys.modules['vmtc_kernels._C'] = None\n"
        "import torch, vmtc_kernels as v\n"
        "x = torch.randn(2, 12, 4)\n"
        "assert v.kmeans(x, 3).sizes.sum() == 24\n"
        "assert v.explain(v.kmeans, x, 3).backend == 'reference'\n"
        "print(v.explain(v.kmeans, x, 3).reasons['cpu'])\n"
        "v.use_backend('cpu')\n"
        "v.kmeans(x, 3)\n"
    )
    done = python(code)
    assert done.returncode == 1
    reason = done.stdout.strip()
    assert reason.startswith("the compiled module does not load: ") and "vmtc_kernels._C" in reason
    assert f"BackendError: kmeans: backend 'cpu' was forced but cannot run: {reason}" in done.stderr
