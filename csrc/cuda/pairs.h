// Inner products or squared distances of all pairs of the chosen tokens of each image.
#pragma once

#include "types.h"

namespace vmtc::cuda {

struct PairsArgs {
  Rows x;  // [B, N, D]
  int64_t B, N, D, C;
  Metric metric;
  const int32_t* rows;    // [B, N]: position of the token of each rank
  const int32_t* counts;  // [B]: how many there are, R

  // [B, C, pairs_stride(C)]: x_i . x_j (cosine) or |x_i - x_j|^2, for i and j < R
  float* pairs;
  float* norms;  // [B, C]: squared norms
};

// rows of pairs begin on 16 bytes
constexpr int64_t pairs_stride(int64_t C) { return (C + 3) / 4 * 4; }

cudaError_t pairs(const PairsArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
