#include "common.cuh"
#include "primary.h"

namespace vmtc::cuda {
namespace {

constexpr int BINS = 256, DIGITS = 4, MOST_WARPS = 32;
// keys that are kept in shared memory; those of larger images are made anew in every pass
constexpr int64_t MOST_KEYS = 8192;

struct Shared {
  int bins[DIGITS * BINS];
  int totals[3][MOST_WARPS];  // tokens above the threshold, at it, and valid, of each warp
  int valid;
  uint32_t threshold;
  int left;
};

// Larger for a higher score; 0 for a token that is not valid, which no score gives.
template <typename T>
__device__ __forceinline__ uint32_t key_of(const PrimaryArgs& args, int64_t b, int64_t i) {
  if (args.valid && !args.valid[b * args.valid_image_stride + i * args.valid_stride]) return 0;
  if (args.P == 0) return 1;
  const T* scores = static_cast<const T*>(args.scores);
  float score = to_float(scores[b * args.score_image_stride + i * args.score_stride]);
  if (score != score) score = -INFINITY;
  if (score == 0) score = 0;
  const uint32_t bits = __float_as_uint(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// one block an image
template <typename T>
__global__ void __launch_bounds__(1024) primary_kernel(PrimaryArgs args, bool stored) {
  Shared& shared = *shared_memory<Shared>();
  uint32_t* keys = reinterpret_cast<uint32_t*>(&shared + 1);
  const int64_t b = block_index(), N = args.N, P = args.P;
  if (b >= args.B) return;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % WARP, warp = thread / WARP;
  const auto key = [&](int64_t i) { return stored ? keys[i] : key_of<T>(args, b, i); };

  for (int i = thread; i < DIGITS * BINS; i += threads) shared.bins[i] = 0;
  if (thread == 0) shared.valid = 0;
  __syncthreads();
  int valid = 0;
  for (int64_t i = thread; i < N; i += threads) {
    const uint32_t mine = key_of<T>(args, b, i);
    if (stored) keys[i] = mine;
    valid += mine != 0;
  }
  valid = warp_sum(valid);
  if (lane == 0 && valid) atomicAdd(&shared.valid, valid);
  __syncthreads();

  // the threshold: the kept-th largest key, found digit by digit; `left` tokens have that key
  const int kept = int(min(P, int64_t(shared.valid)));
  uint32_t threshold = ~0u;
  int left = 0;
  if (kept > 0) {
    threshold = 0;
    left = kept;
    for (int digit = 0; digit < DIGITS; ++digit) {
      const int shift = 8 * (DIGITS - 1 - digit);
      // the digits before, in both; no digit is before the first
      const uint32_t mask = digit == 0 ? 0 : ~0u << (shift + 8);
      for (int64_t i = thread; i < N; i += threads) {
        const uint32_t mine = key(i);
        if (mine != 0 && (mine & mask) == threshold)
          atomicAdd(&shared.bins[digit * BINS + (mine >> shift & (BINS - 1))], 1);
      }
      __syncthreads();
      if (warp == 0) {
        // lane l has the bins from 255 - 8 l downwards
        constexpr int EACH = BINS / WARP;
        const int* bins = shared.bins + digit * BINS + BINS - 1 - EACH * lane;
        int sum = 0;
        for (int j = 0; j < EACH; ++j) sum += bins[-j];
        int before = sum;
        for (int delta = 1; delta < WARP; delta *= 2) {
          const int other = __shfl_up_sync(ALL_LANES, before, delta);
          if (lane >= delta) before += other;
        }
        before -= sum;
        if (before < left && left <= before + sum) {
          int j = 0;
          for (; before + bins[-j] < left; ++j) before += bins[-j];
          shared.threshold = threshold | uint32_t(BINS - 1 - EACH * lane - j) << shift;
          shared.left = left - before;
        }
      }
      __syncthreads();
      threshold = shared.threshold;
      left = shared.left;
    }
  }

  // each warp has a stretch of positions: first it counts, then it places them behind the others'
  const int64_t stretch = ceil_div(N, int64_t(threads)) * WARP;
  const int64_t begin = min(warp * stretch, N), end = min(begin + stretch, N);
  int above = 0, tied = 0, all = 0;
  for (int64_t i = begin + lane; i < end; i += WARP) {
    const uint32_t mine = key(i);
    above += mine > threshold;
    tied += mine == threshold;
    all += mine != 0;
  }
  above = warp_sum(above);
  tied = warp_sum(tied);
  all = warp_sum(all);
  if (lane == 0) {
    shared.totals[0][warp] = above;
    shared.totals[1][warp] = tied;
    shared.totals[2][warp] = all;
  }
  __syncthreads();
  const bool earlier = lane < warp;
  above = warp_sum(earlier ? shared.totals[0][lane] : 0);
  tied = warp_sum(earlier ? shared.totals[1][lane] : 0);
  all = warp_sum(earlier ? shared.totals[2][lane] : 0);

  const unsigned lanes_before = (1u << lane) - 1;
  for (int64_t first = begin; first < end; first += WARP) {
    const int64_t i = first + lane;
    const uint32_t mine = i < end ? key(i) : 0;
    const unsigned over = __ballot_sync(ALL_LANES, mine > threshold);
    const unsigned equal = __ballot_sync(ALL_LANES, mine == threshold);
    const unsigned present = __ballot_sync(ALL_LANES, mine != 0);
    const int ties_before = tied + __popc(equal & lanes_before);
    const int primaries_before = above + __popc(over & lanes_before) + min(ties_before, left);
    const int others_before = all + __popc(present & lanes_before) - primaries_before;
    if (i < end) {
      const bool chosen = mine > threshold || (mine == threshold && ties_before < left);
      args.owner[b * N + i] = chosen ? primaries_before : -1;
      if (chosen)
        args.primary[b * P + primaries_before] = i;
      else if (mine != 0)
        args.rows[b * N + others_before] = i;
    }
    above += __popc(over);
    tied += __popc(equal);
    all += __popc(present);
  }
  for (int64_t p = kept + thread; p < P; p += threads) args.primary[b * P + p] = -1;
  if (thread == 0) args.counts[b] = shared.valid - kept;
}

}  // namespace

cudaError_t select_primary(const PrimaryArgs& args, cudaStream_t stream) {
  if (args.B == 0) return cudaSuccess;
  const bool stored = args.N <= MOST_KEYS;
  const unsigned threads = args.N <= 1024 ? 256 : 1024;
  const size_t bytes = sizeof(Shared) + (stored ? args.N * sizeof(uint32_t) : 0);
  return with_type(args.score_dtype, [&](auto zero) {
    return launch(primary_kernel<decltype(zero)>, {grid_of(args.B), threads, bytes, stream}, args,
                  stored);
  });
}

}  // namespace vmtc::cuda
