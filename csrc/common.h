// What every kernel file needs: argument checks and the dispatch by dtype.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

// float32, float16 and bfloat16 as scalar_t
#define VMTC_DISPATCH(dtype, name, ...)                        \
  AT_DISPATCH_SWITCH(dtype, name,                              \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(__VA_ARGS__))

namespace vmtc {

enum class Metric { cosine, euclidean };

inline Metric parse_metric(std::string_view name) {
  TORCH_CHECK_VALUE(name == "cosine" || name == "euclidean",
                    "metric must be one of ['cosine', 'euclidean'], got '", name, "'");
  return name == "cosine" ? Metric::cosine : Metric::euclidean;
}

// The Python layer has checked shapes and options with better messages; these keep a direct call
// within bounds.
inline void check_cpu_rows(const at::Tensor& x, const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                       x.scalar_type() == at::kBFloat16,
                   name, " must be float32, float16 or bfloat16, got ", x.scalar_type());
}

// x: [B, N, D] with features, its positions within int32
inline void check_tokens(const at::Tensor& x, const char* name) {
  check_cpu_rows(x, name, 3);
  TORCH_CHECK_VALUE(x.size(2) > 0, name, " must have at least one feature, got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) <= std::numeric_limits<int32_t>::max(), name,
                    " must have fewer than 2^31 tokens, got ", x.sizes());
}

inline void check_count(int64_t value, const char* name, int64_t minimum) {
  TORCH_CHECK_VALUE(value >= minimum, name, " must be at least ", minimum, ", got ", value);
}

// valid as a contiguous mask, undefined where absent
inline at::Tensor check_valid(const std::optional<at::Tensor>& valid, const at::Tensor& x) {
  if (!valid.has_value()) return {};
  TORCH_CHECK_TYPE(valid->scalar_type() == at::kBool, "valid must be bool, got ",
                   valid->scalar_type());
  TORCH_CHECK_VALUE(valid->device().is_cpu() && valid->sizes() == x.sizes().slice(0, 2),
                    "valid must be [B, N] like x, got ", valid->sizes());
  return valid->contiguous();
}

// the same tensor with unit stride between features, the other strides as they are
inline at::Tensor unit_rows(const at::Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// positions of the valid tokens of one image, ascending; valid as check_valid returns it
inline std::vector<int32_t> valid_positions(const at::Tensor& valid, int64_t image, int64_t N) {
  std::vector<int32_t> positions;
  positions.reserve(N);
  const bool* mask = valid.defined() ? valid.const_data_ptr<bool>() + image * N : nullptr;
  for (int64_t i = 0; i < N; ++i)
    if (!mask || mask[i]) positions.push_back(i);
  return positions;
}

// How many items a thread takes at least: enough work, in elements touched, for the microseconds
// that its start costs. It cuts no sum, so results do not depend on it.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

inline int64_t images_at_a_time(int64_t images) {
  return images < at::get_num_threads() ? 1 : at::get_num_threads();
}

// body(image, lane): images in parallel where there are enough to occupy every thread, else one
// after the other, with the parallel loops inside an image active. Each image computes the same
// bits either way. Images of one lane do not overlap in time; lanes are below images_at_a_time.
template <typename Body>
void for_each_image(int64_t images, const Body& body) {
  if (images_at_a_time(images) == 1) {
    for (int64_t b = 0; b < images; ++b) body(b, 0);
    return;
  }
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, at::get_thread_num());
  });
}

// `bytes` for each lane of for_each_image, on cache lines of its own
inline at::Tensor make_workspace(int64_t images, int64_t bytes) {
  return at::empty({images_at_a_time(images), (bytes + 63) / 64 * 64}, at::kByte);
}

inline void* workspace_of(const at::Tensor& workspace, int64_t lane) {
  return workspace.mutable_data_ptr<uint8_t>() + lane * workspace.size(1);
}

}  // namespace vmtc
