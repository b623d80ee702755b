// Which pairs of text queries and image tokens are inhibited, a bit each.
#pragma once

#include "focus.h"

namespace vmtc::cuda {

struct FocusMaskArgs {
  Layout layout;       // filled by focus_layout
  const void* scores;  // [B, M, Lq, I]
  Dtype dtype;
  int64_t batch_stride, head_stride, row_stride, image_stride;
  int64_t M, I;
  bool by_ratio;  // keep_ratio counts, else threshold
  double keep_ratio;
  float threshold;
  int64_t min_keep;
  int32_t* mask;  // [B, M, Lq, ceil(I / 32)]
};

cudaError_t focus_mask(const FocusMaskArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
