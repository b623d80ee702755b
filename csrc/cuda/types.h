// Types of the C++ interface to the CUDA kernels: no torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace vmtc::cuda {

enum class Dtype : int { float32, float16, bfloat16 };

enum class Metric : int { cosine, euclidean };

constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of D elements each: [B, N, D] with any strides (in elements) but 1 between the elements.
struct Rows {
  const void* data;
  int64_t image_stride, row_stride;
  Dtype dtype;
};

// Carves a workspace into arrays that start on 256 bytes each. Without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* result = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return result;
  }

  size_t bytes() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace vmtc::cuda
