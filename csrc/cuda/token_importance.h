// How much attention each token receives in one encoder layer.
#pragma once

#include "types.h"

namespace vmtc::cuda {

// Heads of N rows of d elements: [B, H, N, d], any strides (in elements) but 1 between the
// elements.
struct Heads {
  const void* data;
  int64_t image_stride, head_stride, row_stride;
};

struct TokenImportanceArgs {
  Heads q, k;
  Dtype dtype;
  int64_t B, H, N, d;
  int64_t cls_index;  // the query; -1 for the mean over all queries
  float scale;
  void* workspace;    // of token_importance_workspace bytes
  float* importance;  // [B, N]
};

size_t token_importance_workspace(int64_t B, int64_t H, int64_t N, bool one_query);

cudaError_t token_importance(const TokenImportanceArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
