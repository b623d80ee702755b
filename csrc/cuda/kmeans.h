// Lloyd's algorithm on chosen tokens of each image: what kmeans and merge_tokens share.
#pragma once

#include "types.h"

namespace vmtc::cuda {

struct ClusterArgs {
  Rows x;                 // [B, N, D]
  int64_t B, N, D, C, K;  // C: no image has more tokens to cluster; N at most
  int64_t iterations;
  Metric metric;
  const int32_t* rows;    // [B, N]: position of the token of each rank
  const int32_t* counts;  // [B]: tokens to cluster
  void* workspace;        // of cluster_workspace bytes

  int32_t* labels;   // [B, C], by rank
  int32_t* sizes;    // [B, K]
  int32_t* members;  // [B, C]: ranks, cluster by cluster, ascending in each
  int32_t* offsets;  // [B, K + 1]: where each cluster begins among them
  float* scale;      // [B, C]: what makes a feature of each row; 0 for a zero vector with cosine,
                     // -1 where it is not finite
};

// depends on sizes and dtypes alone; args may have no memory yet
size_t cluster_workspace(const ClusterArgs& args);

cudaError_t cluster(const ClusterArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
