// What both forms of Lloyd's algorithm share: the repair's order of tokens, and the lists of
// members.
#pragma once

#include "common.cuh"
#include "kmeans.h"

namespace vmtc::cuda {

// larger for a larger distance, at equal ones for the smaller rank; 0 for none
__device__ __forceinline__ unsigned long long farness(float distance, int rank) {
  const unsigned bits = __float_as_uint(distance + 0.f);
  const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - rank);
}

__device__ __forceinline__ int rank_of(unsigned long long farness) {
  return int(0xffffffffu - unsigned(farness));
}

// by one warp: the sizes [K] of image b, and where each cluster begins
__device__ __forceinline__ void store_sizes(const ClusterArgs& args, int64_t b, const int* sizes) {
  const int lane = threadIdx.x % WARP, K = int(args.K);
  int32_t* offsets = args.offsets + b * (K + 1);
  int before = 0;
  for (int base = 0; base < K; base += WARP) {
    const int k = base + lane, size = k < K ? sizes[k] : 0;
    int through = size;
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, through, delta);
      if (lane >= delta) through += other;
    }
    if (k < K) {
      args.sizes[b * K + k] = size;
      offsets[k] = before + through - size;
    }
    before += __shfl_sync(ALL_LANES, through, WARP - 1);
  }
  if (lane == 0) offsets[K] = before;
}

// by one warp: the ranks of the members of cluster k, after store_sizes
__device__ __forceinline__ void store_members(const ClusterArgs& args, int64_t b, int k,
                                              const int* labels, int R) {
  const int lane = threadIdx.x % WARP;
  const int32_t* offsets = args.offsets + b * (args.K + 1) + k;
  int32_t* members = args.members + b * args.C;
  int place = offsets[0];
  const int end = offsets[1];
  for (int base = 0; base < R && place < end; base += WARP) {
    const int i = base + lane;
    const unsigned here = __ballot_sync(ALL_LANES, i < R && labels[i] == k);
    if (here >> lane & 1) members[place + __popc(here & ((1u << lane) - 1))] = i;
    place += __popc(here);
  }
}

}  // namespace vmtc::cuda
