// The softmax of every text query, for the scores.
#pragma once

#include "focus_scores.h"

namespace vmtc::cuda {

// of a set of logits: the largest, and the sum of exp(logit - largest)
struct Softmax {
  float largest, sum;
};

struct FocusSoftmax {
  int64_t parts;  // of the keys
  // rows are the text queries in their order or, where logits are kept, all queries
  Softmax* partial;  // [B, H, Lq, parts]
  Softmax* whole;    // [B, H, Lq], with share / sum
  // [B, H, Lq, L], scaled, where there are so few queries that keys are worth more than logits,
  // else null; only those of visible keys are written
  float* logits;
};

constexpr int64_t FEW_ROWS = 16;  // queries times the heads of a group

inline bool few_rows(const FocusScoresArgs& args) {
  return args.layout.sequence.Lq * (args.H / args.G) <= FEW_ROWS;
}

FocusSoftmax carve_softmax(Workspace& workspace, const FocusScoresArgs& args);

// share: of each head in the mean over heads
cudaError_t focus_softmax(const FocusScoresArgs& args, const FocusSoftmax& softmax, float share,
                          cudaStream_t stream);

}  // namespace vmtc::cuda
