// Keeps the tokens of highest score, clusters the others and merges each cluster into one token.
#pragma once

#include "types.h"

namespace vmtc::cuda {

struct MergeTokensArgs {
  Rows x;              // [B, N, D]
  Rows features;       // [B, N, Df]: what is clustered
  const void* scores;  // [B, N]
  int64_t score_image_stride, score_stride;
  Dtype score_dtype;
  const bool* valid;  // [B, N], or null
  int64_t valid_image_stride, valid_stride;
  int64_t B, N, D, Df, P, K;
  int64_t iterations;
  Metric metric;
  bool by_score;    // weights are the scores, else 1
  void* workspace;  // of merge_tokens_workspace bytes

  void* tokens;    // [B, P + K, D], of the dtype of x
  int32_t* owner;  // [B, N]
  int32_t* sizes;  // [B, P + K]
};

// depends on sizes, dtypes and strides alone; args may have no memory yet
size_t merge_tokens_workspace(const MergeTokensArgs& args);

cudaError_t merge_tokens(const MergeTokensArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
