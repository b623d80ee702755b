// Means of the rows of each cluster: the centroids of kmeans.
#pragma once

#include "types.h"

namespace vmtc::cuda {

struct SegmentMeanArgs {
  Rows x;  // [B, N, D]
  int64_t B, N, D, C;
  int64_t K;
  const int32_t* rows;     // [B, N]: position of the token of each rank
  const int32_t* members;  // [B, C]: ranks, cluster by cluster
  const int32_t* offsets;  // [B, K + 1]: where each cluster begins among them
  const float* scale;  // [B, C], by rank: a row is multiplied by it; negative: it does not count

  float* means;     // [B, K, D]: of the rows that count, times their scales; 0 where none counts
  int32_t* labels;  // [B, N]: the cluster of each member, at its position; null for none
};

cudaError_t segment_mean(const SegmentMeanArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
