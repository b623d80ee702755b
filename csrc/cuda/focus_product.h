// The product of attention to text with the attention of that text to images.
#pragma once

#include "focus_scores.h"

namespace vmtc::cuda {

struct ToText {
  const float* attention;   // [B, M, chunk, L], columns are ranks of text
  int64_t M, first, chunk;  // text queries from `first` on
};

// the scores of these text queries
cudaError_t focus_product(const FocusScoresArgs& args, const ToText& to_text, cudaStream_t stream);

}  // namespace vmtc::cuda
