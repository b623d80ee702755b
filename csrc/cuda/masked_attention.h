// Causal attention in which pairs of queries and image tokens are inhibited.
#pragma once

#include "focus.h"
#include "token_importance.h"

namespace vmtc::cuda {

struct MaskedAttentionArgs {
  Layout layout;  // filled by focus_layout
  Heads q;        // [B, H, Lq, d]
  Heads k, v;     // [B, G, L, d], [B, G, L, dv]
  Dtype dtype;
  int64_t H, G, d, dv;
  // [B, M, Lq, W], M 1 or H; the stride of M is 0 where it is 1
  const int32_t* mask;
  int64_t mask_batch_stride, mask_head_stride, mask_row_stride, W;
  float penalty;        // log(suppression), added to the logits of inhibited pairs; may be -inf
  const float* logits;  // as focus_logits returns them: keys are not read then; null if unknown
  float scale;
  void* workspace;  // of masked_attention_workspace bytes
  void* out;        // [B, H, Lq, dv]
  float* lse;       // [B, H, Lq], or null
};

// reads the sizes alone
size_t masked_attention_workspace(const MaskedAttentionArgs& args);

cudaError_t masked_attention(const MaskedAttentionArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
