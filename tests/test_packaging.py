"""What an installation gets: a wheel built from the sdist, run in a fresh environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import vmtc_kernels

pytest.importorskip("build")

ROOT = Path(__file__).parents[1]

OPERATOR = """
import torch, vmtc_kernels
x = torch.arange(24.0).reshape(1, 12, 2)
tokens, owner, sizes = torch.ops.vmtc.merge_tokens(x, torch.arange(12.0)[None], 3, 2)
assert tokens.shape == (1, 5, 2) and owner.shape == (1, 12) and sizes.sum() == 12
print(vmtc_kernels.__file__, vmtc_kernels.available_backends()["cpu"], sep="\\n")
"""


def run(*command, **kwargs) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pip(python, *arguments, **variables: str) -> None:
    # no index and no isolation: nothing is downloaded, torch least of all
    run(python, "-m", "pip", *arguments, "--no-deps", "--no-index", env={**os.environ, **variables})


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, ROOT)
    run(*command, env={**os.environ, "VMTC_BUILD": "none"})
    (archive,) = folder.glob("*.tar.gz")
    return archive


def built(sdist: Path, folder: Path, **variables: str) -> Path:
    """The wheel made of an sdist: proof that the sdist is complete."""
    pip(sys.executable, "wheel", "--no-build-isolation", "-w", folder, sdist, **variables)
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return built(sdist, tmp_path_factory.mktemp("wheel"))


def fresh(folder: Path, package: Path) -> Path:
    """Python of a new environment with the wheel, and torch and numpy of the running one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip(python, "install", package)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # a path file adds folders without reading theirs: an editable install there stays unseen
    sites = {str(Path(module.__file__).parents[1]) for module in (torch, numpy)}
    (Path(purelib) / "borrowed.pth").write_text("\n".join(sorted(sites)))
    return python


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory) -> Path:
    return fresh(tmp_path_factory.mktemp("fresh"), wheel)


def test_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    headers = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.[hc]*")}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "triton_kernels/__init__.py"}
    assert not (wanted | headers) - names
    assert not {name for name in names if name.startswith((".venv", "build/"))}


def test_wheel_has_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert top == {"vmtc_kernels", f"vmtc_kernels-{vmtc_kernels.__version__}.dist-info"}
    assert "vmtc_kernels/triton_kernels/__init__.py" in names
    sources = {f"vmtc_kernels/{path.relative_to(ROOT)}" for path in ROOT.glob("bench/**/*.py")}
    assert sources <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_in_a_fresh_environment(fresh_python, tmp_path):
    file, cpu = run(fresh_python, "-c", OPERATOR, cwd=tmp_path).strip().splitlines()[-2:]
    assert Path(file).is_relative_to(fresh_python.parents[1])
    if vmtc_kernels.available_backends()["cpu"] is None:
        assert cpu == "None"


def test_triton_kernels_is_ours_only_below_our_name(fresh_python, tmp_path):
    code = "import importlib.util as u; print(u.find_spec({!r}))"
    below = run(fresh_python, "-c", code.format("vmtc_kernels.triton_kernels"), cwd=tmp_path)
    assert str(fresh_python.parents[1]) in below
    top = run(fresh_python, "-c", code.format("triton_kernels"), cwd=tmp_path)
    assert str(fresh_python.parents[1]) not in top


def test_sdist_installs_without_a_compiler(sdist, tmp_path):
    python = fresh(tmp_path / "env", built(sdist, tmp_path, VMTC_BUILD="none"))
    file, cpu = run(python, "-c", OPERATOR, cwd=tmp_path).strip().splitlines()[-2:]
    assert Path(file).is_relative_to(tmp_path / "env")
    assert "does not load" in cpu


def setup_py(build: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "VMTC_BUILD": build},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_cuda_build_without_cuda_says_what_is_missing():
    refused = setup_py("cuda")
    assert refused.returncode != 0
    assert f"a CUDA build of torch (found {torch.__version__}) and nvcc" in refused.stderr


def test_unknown_build_is_refused():
    refused = setup_py("fast")
    assert refused.returncode != 0
    assert "VMTC_BUILD must be cpu, cuda or none, got 'fast'" in refused.stderr
