// All rounds of Lloyd's algorithm from the pairs of each image, in one launch.
#pragma once

#include "kmeans.h"

namespace vmtc::cuda {

// the most shared memory that every GPU since compute capability 7.5 has
constexpr size_t LEAST_SHARED_MEMORY = 64 * 1024;

// whether lloyd can run on every GPU; a function of sizes alone
bool lloyd_fits(int64_t C, int64_t K);

// float64 numbers of workspace
int64_t lloyd_workspace(int64_t B, int64_t C, int64_t K);

// pairs and norms as pairs() leaves them; sums: lloyd_workspace numbers
cudaError_t lloyd(const ClusterArgs& args, const float* pairs, const float* norms, double* sums,
                  cudaStream_t stream);

}  // namespace vmtc::cuda
