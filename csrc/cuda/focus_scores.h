// How much text queries attend to image tokens through the text before them.
#pragma once

#include "focus.h"
#include "token_importance.h"

namespace vmtc::cuda {

struct FocusScoresArgs {
  Layout layout;  // filled by focus_layout, with rows
  Heads q, k;     // [B, H, Lq, d], [B, G, L, d]
  Dtype dtype;
  int64_t H, G, d, I;
  bool residual, per_head, renormalize;
  float scale;
  // [B, M, L_max, I], M 1 or, per head, H: the attention to images of text at each position; that
  // of the queries is written, that of earlier text read
  float* text_image;
  int64_t state_batch_stride, state_head_stride, state_row_stride, state_image_stride;
  void* workspace;  // of focus_scores_workspace bytes
  float* scores;    // [B, M, Lq, I]
  bool all_rows;    // rows that are not text are set to zero, else left as they are
};

// reads the sizes alone
size_t focus_scores_workspace(const FocusScoresArgs& args);

// The logits of all queries and the keys visible to them, scaled, [B, H, Lq, L]: in the workspace
// once focus_scores is done where there are few queries, else null.
const float* focus_logits(const FocusScoresArgs& args);

cudaError_t focus_scores(const FocusScoresArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
