#include "focus.cuh"
#include "focus_mask.h"

namespace vmtc::cuda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
// scores of a row that stay in shared memory; those behind them are read again
constexpr int64_t MOST_CACHED = 8192;

// Integers in the order of floats; NaN counts as -inf, and -0 equals 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (isnan(x)) x = -INFINITY;
  const uint32_t bits = x == 0 ? 0 : __float_as_uint(x);
  return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 1u << 31 : ~0u));
}

// Sums over the block, the same in every thread; counts: [2, WARPS, N] in shared memory, in turn,
// so that one barrier is enough.
template <int N>
__device__ __forceinline__ void block_sum(int (&x)[N], int* counts, int turn) {
  counts += turn % 2 * WARPS * N;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = warp_sum(x[i]);
    if (threadIdx.x % WARP == 0) counts[threadIdx.x / WARP * N + i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x[i] += counts[w * N + i];
  }
}

// one block a row
template <typename T>
__global__ void __launch_bounds__(THREADS) mask_kernel(FocusMaskArgs args, int cached) {
  uint32_t* keys = shared_memory<uint32_t>();                           // [cached]
  int* counts = reinterpret_cast<int*>(keys + cached);                  // [2, WARPS, 3]
  int* ties_of = counts + 2 * WARPS * 3;                                // [WARPS]
  uint32_t* largest_of = reinterpret_cast<uint32_t*>(ties_of + WARPS);  // [WARPS]
  const Sequence& sequence = args.layout.sequence;
  const int64_t job = block_index();
  if (job >= sequence.B * args.M * sequence.Lq) return;
  const int64_t query = job % sequence.Lq, m = job / sequence.Lq % args.M,
                b = job / sequence.Lq / args.M;
  const int words = int(ceil_div(args.I, int64_t(32)));
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
  int32_t* mask = args.mask + job * words;

  const int position = position_of(sequence, b, query, true);
  const int seen =
      position < 0 ? 0 : int(min(int64_t(images_until(args.layout, b, position)), args.I));
  int64_t keep = args.min_keep;
  if (args.by_ratio) keep = max(keep, int64_t(ceil(args.keep_ratio * double(seen))));
  if (keep >= seen) {
    for (int w = thread; w < words; w += THREADS) mask[w] = 0;
    return;
  }

  const T* row = static_cast<const T*>(args.scores) + b * args.batch_stride + m * args.head_stride +
                 query * args.row_stride;
  const auto key_of = [&](int r) {
    return r < cached ? keys[r] : ordered(to_float(row[r * args.image_stride]));
  };
  uint32_t largest = 0;
  for (int r = thread; r < seen; r += THREADS) {
    const uint32_t key = ordered(to_float(row[r * args.image_stride]));
    if (r < cached) keys[r] = key;
    largest = max(largest, key);
  }
  largest = warp_max(largest);
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = max(largest, largest_of[w]);

  // the key of place `keep`, two bits at a time
  uint32_t bound = 0;
  int turn = 0;
  for (int shift = 30; shift >= 0; shift -= 2, ++turn) {
    int reached[3] = {};
    for (int r = thread; r < seen; r += THREADS) {
      const uint32_t key = key_of(r);
#pragma unroll
      for (int i = 0; i < 3; ++i) reached[i] += key >= (bound | uint32_t(i + 1) << shift);
    }
    block_sum(reached, counts, turn);
    const uint32_t digit = (reached[0] >= keep) + (reached[1] >= keep) + (reached[2] >= keep);
    bound |= digit << shift;
  }
  int above[1] = {};
  for (int r = thread; r < seen; r += THREADS) above[0] += key_of(r) > bound;
  block_sum(above, counts, turn);
  const int kept_ties = int(keep) - above[0];

  // each warp has some neighbouring words; of keys equal to the bound the first stay
  const int share = ceil_div(words, WARPS), begin = warp * share, end = min(words, begin + share);
  const uint32_t lower = lowest<uint32_t>(lane);
  const auto each_word = [&](int ties, const auto& f) {
    for (int w = begin; w < end; ++w) {
      const int r = w * 32 + lane;
      const uint32_t key = r < seen ? key_of(r) : 0;
      const uint32_t equal = __ballot_sync(ALL_LANES, r < seen && key == bound);
      f(w, r, key, ties + __popc(equal & lower));
      ties += __popc(equal);
    }
    return ties;
  };
  const int own_ties = each_word(0, [](int, int, uint32_t, int) {});
  if (lane == 0) ties_of[warp] = own_ties;
  __syncthreads();
  int ties_before = 0;
  for (int w = 0; w < warp; ++w) ties_before += ties_of[w];
  const float limit = args.threshold * value_of(largest);
  each_word(ties_before, [&](int w, int r, uint32_t key, int ties) {
    const bool kept = key > bound || (key == bound && ties < kept_ties);
    const bool low = args.by_ratio || value_of(key) < limit;
    const uint32_t bits = __ballot_sync(ALL_LANES, r < seen && !kept && low);
    if (lane == 0) mask[w] = int32_t(bits);
  });
}

}  // namespace

cudaError_t focus_mask(const FocusMaskArgs& args, cudaStream_t stream) {
  const int64_t rows = args.layout.sequence.B * args.M * args.layout.sequence.Lq;
  if (rows == 0 || args.I == 0) return cudaSuccess;
  const int cached = int(std::min(args.I, MOST_CACHED));
  const size_t bytes = (cached + (2 * 3 + 2) * WARPS) * sizeof(int);
  return with_type(args.dtype, [&](auto zero) {
    return launch(mask_kernel<decltype(zero)>, {grid_of(rows), THREADS, bytes, stream}, args,
                  cached);
  });
}

}  // namespace vmtc::cuda
