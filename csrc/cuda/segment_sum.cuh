// Weighted sums of rows: what merging and the means of clusters share. A block makes a slice of the
// elements of one sum; its warps take the rows in turn. The order of the additions depends on the
// number of rows alone.
#pragma once

#include "common.cuh"

namespace vmtc::cuda {

// A sum in two floats, about as exact as one double: conversions to double are slow on most GPUs.
struct TwoFloats {
  float sum = 0, rest = 0;

  __device__ __forceinline__ void add(float x) {
    const float next = __fadd_rn(sum, x), moved = __fsub_rn(next, sum);
    const float lost = __fadd_rn(__fsub_rn(sum, __fsub_rn(next, moved)), __fsub_rn(x, moved));
    sum = next;
    rest = __fadd_rn(rest, lost);
  }
  __device__ __forceinline__ void add(const TwoFloats& other) {
    add(other.sum);
    rest = __fadd_rn(rest, other.rest);
  }
  // rest is NaN where sum is infinite
  __device__ __forceinline__ float value() const {
    return fabsf(sum) < INFINITY ? __fadd_rn(sum, rest) : sum;
  }
  __device__ __forceinline__ float divided_by(int count) const {
    return fabsf(sum) < INFINITY ? float((double(sum) + double(rest)) / count) : sum / count;
  }
};

// a row of the image, by its offset in elements (-1: none), and what it is multiplied by
struct WeightedRow {
  int64_t offset;
  float weight;
};

template <typename T>
struct SegmentSum {
  static constexpr int WARPS = 4, THREADS = WARPS * WARP, UNROLL = 4;
  // elements of a lane and of a slice
  static constexpr int EACH = Pack<T>::SIZE, WIDTH = WARP * EACH;

  struct Shared {
    int64_t offset[THREADS];
    float weight[THREADS];
    double total[WARPS];
    TwoFloats partial[WARPS - 1][EACH][WARP];
  };

  // the element e of a lane: neighbours where rows are packed, else so that lanes are neighbours
  template <bool PACKED>
  __device__ static int64_t element(int64_t first, int e) {
    const int lane = threadIdx.x % WARP;
    return first + (PACKED ? lane * EACH + e : lane + e * WARP);
  }

  // value added over the block, in every thread; called once
  __device__ static double total(Shared& shared, double value) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) shared.total[threadIdx.x / WARP] = value;
    __syncthreads();
    return (shared.total[0] + shared.total[1]) + (shared.total[2] + shared.total[3]);
  }

  // The sum over j < count of the rows member(j), elements from `first` on, in the lanes of warp 0.
  // Every thread of the block calls it; each member is asked for once.
  template <bool PACKED, typename Member>
  __device__ static void run(Shared& shared, const T* image, int64_t D, int64_t first, int count,
                             const Member& member, TwoFloats (&sum)[EACH]) {
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    for (int base = 0; base < count; base += THREADS) {
      if (base > 0) __syncthreads();
      if (base + thread < count) {
        const WeightedRow row = member(base + thread);
        shared.offset[thread] = row.offset;
        shared.weight[thread] = row.weight;
      }
      __syncthreads();
      const int here = min(count - base, THREADS);
      for (int j = warp; j < here; j += WARPS * UNROLL) {
        // no condition on the loads, so that all are under way before the first is used: what is
        // read beyond the last row, or is no row, is not added
        T row[UNROLL][EACH];
        int64_t offset[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          offset[u] = j + u * WARPS < here ? shared.offset[j + u * WARPS] : -1;
          load<PACKED>(image + max(offset[u], int64_t(0)), D, first, row[u]);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          if (offset[u] >= 0) {
            const float weight = shared.weight[j + u * WARPS];
#pragma unroll
            for (int e = 0; e < EACH; ++e) sum[e].add(__fmul_rn(weight, to_float(row[u][e])));
          }
      }
    }
    if (warp > 0)
      for (int e = 0; e < EACH; ++e) shared.partial[warp - 1][e][lane] = sum[e];
    __syncthreads();
    if (warp == 0)
      for (int w = 0; w < WARPS - 1; ++w)
#pragma unroll
        for (int e = 0; e < EACH; ++e) sum[e].add(shared.partial[w][e][lane]);
  }

  template <bool PACKED>
  __device__ __forceinline__ static void load(const T* row, int64_t D, int64_t first,
                                              T (&out)[EACH]) {
    // lanes beyond the features read the last ones, and store nothing
    if constexpr (PACKED) {
      const Pack<T> pack = load_pack(row + min(element<true>(first, 0), D - EACH));
#pragma unroll
      for (int e = 0; e < EACH; ++e) out[e] = pack.value[e];
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) out[e] = row[min(element<false>(first, e), D - 1)];
    }
  }

  // value(e) of each lane of a warp to out[element(e)]
  template <bool PACKED, typename Out, typename Value>
  __device__ __forceinline__ static void store(Out* out, int64_t D, int64_t first,
                                               const Value& value) {
    if constexpr (PACKED) {
      constexpr int SIZE = Pack<Out>::SIZE;
      const int64_t at = element<true>(first, 0);
      if (at >= D) return;
#pragma unroll
      for (int p = 0; p < EACH; p += SIZE) {
        Pack<Out> pack;
#pragma unroll
        for (int e = 0; e < SIZE; ++e) pack.value[e] = from_float<Out>(value(p + e));
        store_global(out + at + p, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int64_t at = element<false>(first, e);
        if (at < D) out[at] = from_float<Out>(value(e));
      }
    }
  }
};

}  // namespace vmtc::cuda
