// From tensors to the arguments of the kernels: for the files that register operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>
#include <string_view>

#include "types.h"

namespace vmtc::cuda {

// where the kernels run: CUDA, or CPU in the emulated build
constexpr c10::DeviceType DEVICE = c10::DeviceType::VMTC_CUDA_KEY;

// The Python layer has checked shapes and options with better messages; these keep a direct call
// within bounds.
inline Dtype dtype_of(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kHalf:
      return Dtype::float16;
    case at::kBFloat16:
      return Dtype::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

inline void check_tensor(const at::Tensor& x, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(x.device().type() == DEVICE, name, " must be on a ", DEVICE, " device, got ",
                    x.device());
  TORCH_CHECK_VALUE(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.sizes());
}

inline void check_same_device(const at::Tensor& x, const char* name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.device() == other.device(), name, " must be on ", other.device(), ", got ",
                    x.device());
}

// x: [B, N, D] with features, its positions within int32
inline void check_tokens(const at::Tensor& x, const char* name) {
  check_tensor(x, name, 3);
  dtype_of(x, name);
  TORCH_CHECK_VALUE(x.size(2) > 0, name, " must have at least one feature, got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= std::numeric_limits<int32_t>::max(), name,
                    " must have fewer than 2^31 tokens, got ", x.sizes());
}

// x: [B, N, D]
inline void check_valid(const std::optional<at::Tensor>& valid, const at::Tensor& x) {
  if (!valid.has_value()) return;
  TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, "valid must be bool, got ",
                   valid->scalar_type());
  TORCH_CHECK_VALUE(valid->sizes() == x.sizes().slice(0, 2), "valid must be [B, N] like x, got ",
                    valid->sizes());
  check_same_device(*valid, "valid", x);
}

inline void check_count(int64_t value, const char* name, int64_t minimum) {
  TORCH_CHECK_VALUE(value >= minimum, name, " must be at least ", minimum, ", got ", value);
}

inline Metric parse_metric(std::string_view name) {
  TORCH_CHECK_VALUE(name == "cosine" || name == "euclidean",
                    "metric must be one of ['cosine', 'euclidean'], got '", name, "'");
  return name == "cosine" ? Metric::cosine : Metric::euclidean;
}

// the same tensor with unit stride between features, the other strides as they are
inline at::Tensor unit_rows(const at::Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// x: [B, N, D] as unit_rows returns it
inline Rows rows_of(const at::Tensor& x, const char* name) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x, name)};
}

// uninitialised memory on the device of `like`; the allocator keeps it until the stream has passed
inline at::Tensor make_workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

inline cudaStream_t stream_of(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline void check_launched(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace vmtc::cuda
