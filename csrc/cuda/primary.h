// The primary tokens of each image, and the positions of the others.
#pragma once

#include "types.h"

namespace vmtc::cuda {

// Of the valid tokens the P of highest score: ties to the smaller position, NaN as -inf.
struct PrimaryArgs {
  const void* scores;  // [B, N], null where P = 0
  int64_t score_image_stride, score_stride;
  Dtype score_dtype;
  const bool* valid;  // [B, N], or null
  int64_t valid_image_stride, valid_stride;
  int64_t B, N, P;

  int32_t* owner;    // [B, N]: rank of a primary token among them by position, -1 for all others
  int32_t* primary;  // [B, P]: their positions, ascending, -1 for those that are missing
  int32_t* rows;     // [B, N]: positions of the other valid tokens, ascending, at the front
  int32_t* counts;   // [B]: how many these are
};

cudaError_t select_primary(const PrimaryArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
