"""Build of the compiled module. Metadata is in pyproject.toml.

VMTC_BUILD chooses what is compiled into vmtc_kernels._C:
  cpu   the C++ kernels
  cuda  those and the CUDA kernels; needs a CUDA build of torch and nvcc
  none  nothing: the plain-PyTorch reference serves
Unset, it is cuda where that can be had, else cpu.
"""

import os
import platform
import subprocess
import sys
from glob import glob

from setuptools import setup


def is_clang(compiler: str) -> bool:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return "clang" in version.stdout


def compiled() -> dict:
    build = os.environ.get("VMTC_BUILD", "auto")
    if build not in ("auto", "cpu", "cuda", "none"):
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
    cuda_sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
    can_cuda = bool(torch.version.cuda and CUDA_HOME and cuda_sources)
    if build == "cuda" and not can_cuda:
        sys.exit(
            f"VMTC_BUILD=cuda needs CUDA sources (found {len(cuda_sources)}), a CUDA build of torch"
            f" (found {torch.__version__}) and nvcc (found {CUDA_HOME})"
        )
    use_cuda = can_cuda and build != "cpu"

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
    extension = (CUDAExtension if use_cuda else CppExtension)(
        "vmtc_kernels._C",
        sources + (cuda_sources if use_cuda else []),
        include_dirs=[os.path.abspath("csrc")],
        depends=glob("csrc/**/*.h", recursive=True),
        define_macros=[
            ("VMTC_BUILD_FLAGS", f'"{flags}"'),
            ("VMTC_BUILD_KIND", '"cuda"' if use_cuda else '"cpu"'),
        ],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
        extra_link_args=link,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**compiled())
