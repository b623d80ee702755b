"""The emulator that runs CUDA kernels without a GPU, on kernels whose results are known."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which(CXX),
    reason="the emulator needs an x86-64 processor and a C++ compiler",
)


def built(folder: Path, *sources: Path) -> Path:
    """A program of these C++ sources with the emulator."""
    program = folder / "program"
    flags = ["-std=c++20", "-O2", "-mavx2", "-mfma", "-mf16c", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Werror"]
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    own = [HERE / f"{name}.cpp" for name in ("emulator", "collectives", "runtime")]
    # what ends in .cu is C++ too
    subprocess.run([CXX, *flags, *includes, "-x", "c++", *sources, *own, "-o", program], check=True)
    return program


def run(*command: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("selftest"), HERE / "selftest.cpp")


@pytest.mark.parametrize("capability", ["75", "80", "90"])
@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
def test_known_kernels(selftest: Path, order: str, capability: str) -> None:
    done = run(selftest, VMTC_EMULATOR_ORDER=order, VMTC_EMULATOR_CAPABILITY=capability)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("absent", "deadlock, 1 threads have exited"),
        ("divergent", "waits at another barrier"),
        ("lanes", "in __shfl_sync at"),
        ("bounds", "wrote beyond its 384 bytes of shared memory"),
        ("alignment", "misaligned address"),
    ],
)
@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
def test_wrong_kernels_end_the_process(
    selftest: Path, order: str, kernel: str, message: str
) -> None:
    done = run(selftest, kernel, VMTC_EMULATOR_ORDER=order)
    assert done.returncode != 0
    assert message in done.stderr


def test_unknown_order_is_refused(selftest: Path) -> None:
    done = run(selftest, VMTC_EMULATOR_ORDER="backwards")
    assert done.returncode != 0
    assert "must be forward, reverse or a number" in done.stderr


def test_example_of_the_cpp_interface(tmp_path: Path) -> None:
    kernels = sorted(ROOT.glob("csrc/cuda/*.cu"))
    example = built(tmp_path, ROOT / "examples/cpp/merge_tokens.cpp", *kernels)
    environments = (
        {"VMTC_EMULATOR_CAPABILITY": "75"},
        {"VMTC_EMULATOR_CAPABILITY": "90"},
        # the driver has compiled the PTX of an older GPU, which has no clusters
        {"VMTC_EMULATOR_CAPABILITY": "90", "VMTC_EMULATOR_CODE": "80"},
        {"VMTC_EMULATOR_CAPABILITY": "90", "VMTC_EMULATOR_CROWDED": "1"},
    )
    for environment in environments:
        done = run(example, **environment)
        assert done.returncode == 0, done.stderr
        assert "1152 tokens in 320 slots" in done.stdout
