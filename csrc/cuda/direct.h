// Lloyd's algorithm on the tokens themselves, for images of many tokens or clusters.
#pragma once

#include "kmeans.h"

namespace vmtc::cuda {

size_t direct_workspace(const ClusterArgs& args);

// a few launches a round; an image whose labels have come to rest is passed over by a flag
cudaError_t direct(const ClusterArgs& args, cudaStream_t stream);

}  // namespace vmtc::cuda
