"""Build of the compiled module. Metadata is in pyproject.toml.

VMTC_BUILD chooses what is compiled into vmtc_kernels._C:
  cpu       the C++ kernels
  cuda      those and the CUDA kernels; needs a CUDA build of torch and nvcc
  emulated  those and the CUDA kernels as plain C++ over tests/emulator, to test them without a GPU
  none      nothing: the plain-PyTorch reference serves
Unset, it is cuda where that can be had, else cpu.
"""

import os
import platform
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

# code for GPUs of compute capability 7.5 and 8.x to 10.x; PTX of the last serves newer ones.
# TORCH_CUDA_ARCH_LIST overrides it
GPUS = ("75", "80", "90a", "100")


def is_clang(compiler: str) -> bool:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return "clang" in version.stdout


def gpu_code(nvcc: str) -> list[str]:
    """Flags of nvcc for those of GPUS that it knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [gpu for gpu in GPUS if f"sm_{gpu.rstrip('a')}" in listed.stdout.split()]
    # what ends in a letter runs on no other GPU, as PTX neither
    newest = [gpu for gpu in known if gpu.isdecimal()][-1]
    flags = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in known]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def included(kernels: list[str], folder: str, suffix: str) -> list[str]:
    """A source for each csrc/cuda/<op>.cu that includes it.

    Compiled itself, its object would bear the name of that of <op>.cpp; and g++ takes no .cu.
    """
    sources = []
    for kernel in map(Path, kernels):
        source = Path(folder, f"{kernel.stem}_kernels{suffix}")
        line = f'#include "{kernel.absolute()}"\n'
        # a newer file would be compiled anew
        if not source.exists() or source.read_text() != line:
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(line)
        sources.append(str(source))
    return sources


def compiled() -> dict:
    build = os.environ.get("VMTC_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "emulated", "none"):
        sys.exit(f"VMTC_BUILD must be cpu, cuda or none, got {build!r}")
    if build == "none":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import (
            CUDA_HOME,
            BuildExtension,
            CppExtension,
            CUDAExtension,
            get_cxx_compiler,
        )
    except ImportError as error:
        sys.exit(
            f"torch is needed to compile the kernels ({error}). Install torch, setuptools and"
            " ninja, then pip install --no-build-isolation, or set VMTC_BUILD=none to do without."
        )

    sources = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    cuda_sources, kernels = sorted(glob("csrc/cuda/*.cpp")), sorted(glob("csrc/cuda/*.cu"))
    can_cuda = bool(torch.version.cuda and CUDA_HOME and kernels)
    if build == "cuda" and not can_cuda:
        sys.exit(
            f"VMTC_BUILD=cuda needs CUDA sources (found {len(kernels)}), a CUDA build of torch"
            f" (found {torch.__version__}) and nvcc (found {CUDA_HOME})"
        )
    if build == "auto":
        build = "cuda" if can_cuda else "cpu"

    # -g0: python's own flags ask for debug information, ten times the size of the code
    cxx = [
        "-g0",
        "-O3",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
    ]
    link = []
    if platform.machine() in ("x86_64", "AMD64"):
        # the vector width of ATen's AVX2 kernels; the registry refuses the module on less
        cxx += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    if platform.system() == "Linux" and not is_clang(get_cxx_compiler()):
        # clang's OpenMP needs another run time than the one that torch brings: loops are serial.
        # not passed to the linker: at run time the symbols come from the OpenMP that torch brings,
        # so that the process has one thread pool
        cxx.append("-fopenmp")
    if os.environ.get("VMTC_ASAN") == "1":
        cxx += ["-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"]
        link.append("-fsanitize=address")
    flags = " ".join(cxx)
    include = [os.path.abspath("csrc")]
    macros = [("VMTC_BUILD_FLAGS", f'"{flags}"'), ("VMTC_BUILD_KIND", f'"{build}"')]
    nvcc = []
    if build == "cuda":
        sources += cuda_sources + included(kernels, "build/kernels", ".cu")
        macros.append(("VMTC_CUDA_KEY", "CUDA"))
        nvcc = ["-O3", "-std=c++20", *gpu_code(os.path.join(CUDA_HOME, "bin", "nvcc"))]
    elif build == "emulated":
        sources += cuda_sources + included(kernels, "build/emulated/kernels", ".cpp")
        names = ("emulator", "collectives", "runtime")
        sources += [f"tests/emulator/{name}.cpp" for name in names]
        include.append(os.path.abspath("tests/emulator"))
        macros.append(("VMTC_CUDA_KEY", "CPU"))
    extension = (CUDAExtension if build == "cuda" else CppExtension)(
        "vmtc_kernels._C",
        sources,
        include_dirs=include,
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**compiled())
