// The compiled module: importing it registers the kernels of csrc/cpu (and csrc/cuda).
#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"build", VMTC_BUILD_KIND},          {"compiler", __VERSION__},
      {"flags", VMTC_BUILD_FLAGS},         {"torch", TORCH_VERSION},
#ifdef _OPENMP
      {"openmp", std::to_string(_OPENMP)},
#else
      {"openmp", "no"},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of vmtc_kernels.";
  m.def("build_info", &build_info, "How this module was built: kind, compiler, flags, torch.");
}
