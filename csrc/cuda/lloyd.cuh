// Lloyd's algorithm on one image, from its pairs: by one block, or by the blocks of a cluster.
#pragma once

#include <cfloat>

#include "grouping.cuh"

namespace vmtc::cuda {

// The tokens of an image are cut into as many strips, whatever blocks there are: sums over tokens
// are sums over the strips, so every form of the kernel gives the same bits.
constexpr int STRIPS = 8;
// rows that a warp sums at a time, two a lane
constexpr int CHUNK = 2 * WARP;
// of a token whose distances a warp computes together
constexpr int SPLITS = 8, TOKENS = WARP / SPLITS;
// many threads for one block, fewer that load more each where latency counts
constexpr int MANY_THREADS = 1024, FEW_THREADS = 512;

__host__ __device__ constexpr int rows_of_strip(int tokens) {
  return ((tokens + STRIPS - 1) / STRIPS + 3) / 4 * 4;
}

// where a block keeps what in its shared memory
struct Layout {
  int rows, sum_stride;  // tokens of the block; from one cluster to the next in its sums
  unsigned weight, own, labels, summed, sizes, counts, dirty, factor, shift, partial, queue, sums,
      pairs;
  size_t bytes;

  __host__ __device__ Layout(int C, int K, int blocks, int warps, bool has_sums, bool has_pairs) {
    const int strips = STRIPS / blocks;
    rows = rows_of_strip(C) * strips;
    // so that the tokens and clusters that a warp reads at once lie in different banks
    sum_stride = (rows + 11) / 16 * 16 + 4;
    size_t end = 0;
    const auto take = [&](size_t count, size_t size) {
      const unsigned start = unsigned(end);
      end += (count * size + 15) / 16 * 16;
      return start;
    };
    weight = take(C, sizeof(double));
    own = take(C, sizeof(float));
    labels = take(C, sizeof(int));
    summed = take(C, sizeof(int));
    sizes = take(K, sizeof(int));
    counts = take(K, sizeof(int));
    dirty = take(K, sizeof(int));
    factor = take(K, sizeof(double));
    shift = take(K, sizeof(double));
    partial = take(size_t(strips) * K, sizeof(double));
    queue = take(warps * 2 * WARP, sizeof(int));
    sums = take(has_sums ? size_t(K) * sum_stride : 0, sizeof(double));
    pairs = take(has_pairs ? size_t(C) * rows : 0, sizeof(float));
    bytes = end;
  }
};

struct Nearest {
  float distance;
  int k;

  __device__ __forceinline__ void consider(float other, int other_k) {
    // NaN is not smaller than anything
    if (other < distance || (other == distance && other_k < k)) {
      distance = other;
      k = other_k;
    }
  }
};

// CLUSTER: the blocks of a cluster share an image, its pairs lie in their shared memory. Otherwise
// a block has an image, and its pairs stay where they are. SHARED_SUMS: in shared memory as well.
template <bool EUCLIDEAN, bool CLUSTER, bool SHARED_SUMS>
struct Lloyd {
  // pairs that a thread loads at once; a block of many threads has few registers for each
  static constexpr int UNROLL = CLUSTER || !SHARED_SUMS ? 8 : 4;

  const ClusterArgs& args;
  const float *pairs, *norms;  // of the image
  double* global_sums;
  int64_t b;
  int ld, R, C, K, blocks, block;
  int first, rows, strip_rows, sum_stride;
  char* memory;
  Layout layout;
  int thread, threads, lane, warp, warps;

  __device__ Lloyd(const ClusterArgs& args, const float* all_pairs, const float* all_norms,
                   double* all_sums)
      : args(args),
        blocks(CLUSTER ? cluster_size() : 1),
        block(CLUSTER ? cluster_rank() : 0),
        memory(shared_memory<char>()),
        layout(int(args.C), int(args.K), blocks, blockDim.x / WARP, SHARED_SUMS, CLUSTER) {
    thread = threadIdx.x, threads = blockDim.x;
    lane = thread % WARP, warp = thread / WARP, warps = threads / WARP;
    C = int(args.C), K = int(args.K);
    ld = (C + 3) / 4 * 4;
    b = block_index() / blocks;
    R = b < args.B ? args.counts[b] : 0;
    strip_rows = rows_of_strip(R);
    first = strip_rows * (STRIPS / blocks) * block;
    rows = max(0, min(R - first, strip_rows * (STRIPS / blocks)));
    sum_stride = layout.sum_stride;
    pairs = all_pairs + b * C * ld;
    norms = all_norms + b * C;
    global_sums = all_sums + b * K * sum_stride;
  }

  template <typename T>
  __device__ __forceinline__ T* at(unsigned offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
  // r (cosine) or 1 by rank; -1 where not finite
  __device__ __forceinline__ double* weight() const { return at<double>(layout.weight); }
  __device__ __forceinline__ float* own() const { return at<float>(layout.own); }
  __device__ __forceinline__ int* labels() const { return at<int>(layout.labels); }
  // the labels that the sums follow
  __device__ __forceinline__ int* summed() const { return at<int>(layout.summed); }
  __device__ __forceinline__ int* sizes() const { return at<int>(layout.sizes); }
  // finite members
  __device__ __forceinline__ int* counts() const { return at<int>(layout.counts); }
  // whether the members of a cluster changed
  __device__ __forceinline__ int* dirty() const { return at<int>(layout.dirty); }
  __device__ __forceinline__ double* factor() const { return at<double>(layout.factor); }
  __device__ __forceinline__ double* shift() const { return at<double>(layout.shift); }
  // T or W of each strip and cluster
  __device__ __forceinline__ double* partial() const { return at<double>(layout.partial); }

  // S of cluster k, of the block's own tokens
  __device__ __forceinline__ double* sums(int k) const {
    if constexpr (SHARED_SUMS) return at<double>(layout.sums) + k * sum_stride;
    return global_sums + int64_t(k) * sum_stride;
  }
  // the pairs of token j with the block's own tokens
  __device__ __forceinline__ const float* pairs_of(int j) const {
    if constexpr (CLUSTER) return at<float>(layout.pairs) + j * layout.rows;
    return pairs + int64_t(j) * ld;
  }

  // all threads that share the image
  __device__ __forceinline__ void sync() const {
    if constexpr (CLUSTER)
      cluster_sync();
    else
      __syncthreads();
  }

  __device__ __forceinline__ float zero_norm() const { return float(args.D) * FLT_MIN; }

  __device__ void load() {
    if constexpr (CLUSTER) {
      const int packs = strip_rows * (STRIPS / blocks) / 4;
      for (int e = thread; e < R * packs; e += threads) {
        const int j = e / packs, i = e % packs * 4;
        if (first + i < R)
          cp_async<16>(at<float>(layout.pairs) + j * layout.rows + i,
                       pairs + int64_t(j) * ld + first + i);
      }
      cp_async_commit();
    }
    for (int i = thread; i < R; i += threads) {
      const float norm = norms[i];
      const bool finite = norm < INFINITY;
      double scale = finite ? 1 : -1;
      if (!EUCLIDEAN && finite) scale = norm > zero_norm() ? 1 / sqrt(double(norm)) : 0;
      weight()[i] = scale;
      summed()[i] = -1;
      if (block == 0) args.scale[b * C + i] = float(scale);
    }
    cp_async_wait<0>();
    sync();
  }

  // Nearest of the K distances of each own token, told to all blocks. A warp has some tokens, and
  // some clusters of each at a time: lanes that are neighbours have tokens that are.
  template <typename Distance>
  __device__ __forceinline__ void assign(const Distance& distance) {
    const int split = lane / TOKENS;
    for (int base = warp * TOKENS; base < rows; base += warps * TOKENS) {
      const int i = base + lane % TOKENS;
      Nearest nearest{INFINITY, split < K ? split : 0x7fffffff};
      const double mine = i < rows ? weight()[first + i] : -1;
      if (mine >= 0)
        for (int k = split; k < K; k += SPLITS) nearest.consider(distance(i, k, mine), k);
#pragma unroll
      for (int bits = TOKENS; bits < WARP; bits *= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, nearest.distance, bits);
        const int other_k = __shfl_xor_sync(ALL_LANES, nearest.k, bits);
        nearest.consider(other, other_k);
      }
      if (i < rows && split < blocks) {
        int* to_label = labels() + first + i;
        float* to_own = own() + first + i;
        if constexpr (CLUSTER) {
          to_label = map_shared(to_label, split);
          to_own = map_shared(to_own, split);
        }
        *to_label = nearest.k;
        *to_own = nearest.distance;
      }
    }
    sync();
  }

  // the float32 cosine is rounded before it is taken from 1: equal directions stay at distance 0
  __device__ static float cosine_distance(double cosine) { return 1.f - float(cosine); }

  __device__ void assign_to_seeds() {
    assign([&](int i, int k, double mine) {
      const int seed = int((2 * int64_t(k) + 1) * R / (2 * K));
      const double theirs = weight()[seed];
      const float pair = pairs_of(seed)[i];
      if constexpr (EUCLIDEAN) return theirs < 0 ? norms[first + i] : pair;
      return theirs > 0 ? cosine_distance(mine * pair * theirs) : 1.f;
    });
  }

  __device__ void assign_to_means() {
    assign([&](int i, int k, double mine) {
      const double sum = sums(k)[i], by = factor()[k];
      if constexpr (EUCLIDEAN) return by == 0 ? norms[first + i] : float(sum * by - shift()[k]);
      return by == 0 ? 1.f : cosine_distance(mine * sum * by);
    });
  }

  // Sizes, and the token farthest from its centroid to each empty cluster; whether a label is other
  // than the one that was summed. Every block does the same.
  __device__ bool repair() {
    for (int k = thread; k < K; k += threads) sizes()[k] = counts()[k] = dirty()[k] = 0;
    __syncthreads();
    for (int i = thread; i < R; i += threads) {
      atomicAdd(&sizes()[labels()[i]], 1);
      if (weight()[i] >= 0) atomicAdd(&counts()[labels()[i]], 1);
    }
    __syncthreads();
    bool empty = false;
    for (int k = thread; k < K; k += threads) empty |= sizes()[k] == 0;
    if (__syncthreads_or(empty)) {
      if (warp == 0) fill_empty();
      __syncthreads();
    }
    bool changed = false;
    for (int i = thread; i < R; i += threads) {
      const int now = labels()[i], former = summed()[i];
      if (now == former) continue;
      changed = true;
      dirty()[now] = 1;
      if (former >= 0) dirty()[former] = 1;
    }
    return __syncthreads_or(changed);
  }

  __device__ void fill_empty() {
    for (int k = 0; k < K; ++k) {
      if (sizes()[k] > 0) continue;
      unsigned long long farthest = 0;
      for (int i = lane; i < R; i += WARP)
        if (sizes()[labels()[i]] >= 2) farthest = max(farthest, farness(own()[i], i));
      farthest = warp_max(farthest);
      __syncwarp();
      if (farthest == 0) return;
      const int i = rank_of(farthest);
      if (lane == 0) {
        const int former = labels()[i], finite = weight()[i] >= 0;
        --sizes()[former];
        counts()[former] -= finite;
        sizes()[k] = 1;
        counts()[k] = finite;
        labels()[i] = k;
      }
      __syncwarp();
    }
  }

  // sums and their totals follow the labels; a warp has one cluster and one strip at a time
  __device__ void update(bool anew) {
    int* queue = at<int>(layout.queue) + warp * 2 * WARP;
    const int strips = STRIPS / blocks;
    for (int item = warp; item < strips * K; item += warps) {
      const int strip = item / K, k = item % K;
      if (!anew && !dirty()[k]) continue;
      double total = 0;
      const int begin = strip * strip_rows, end = min(begin + strip_rows, rows);
      for (int chunk = begin; chunk < end; chunk += CHUNK)
        total += update_chunk(queue, k, chunk + 2 * lane, end, anew);
      total = warp_sum(total);
      if (lane == 0) partial()[strip * K + k] = EUCLIDEAN ? total / 2 : total;
    }
  }

  // two own tokens from i on; returns their part of the total
  __device__ __forceinline__ double update_chunk(int* queue, int k, int i, int end, bool anew) {
    const bool inside = i < end;
    double2* kept = reinterpret_cast<double2*>(sums(k) + i);
    double2 sum = make_double2(0, 0);
    if (inside && !anew) sum = *kept;
    int queued = 0;
    for (int base = 0; base < R; base += WARP) {
      const int j = base + lane;
      int sign = 0;
      if (j < R && weight()[j] > 0) sign = (labels()[j] == k) - (summed()[j] == k);
      const unsigned moved = __ballot_sync(ALL_LANES, sign != 0);
      if (sign) queue[queued + __popc(moved & ((1u << lane) - 1))] = sign * (j + 1);
      queued += __popc(moved);
      if (queued < WARP && base + WARP < R) continue;
      __syncwarp();
      for (int e = 0; e < queued; e += UNROLL) {
        float2 pair[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          pair[u] = make_float2(0, 0);
          if (e + u < queued && inside)
            pair[u] = *reinterpret_cast<const float2*>(pairs_of(abs(queue[e + u]) - 1) + i);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          if (e + u < queued) {
            const int event = queue[e + u];
            const double by = event > 0 ? weight()[event - 1] : -weight()[-event - 1];
            sum.x += by * pair[u].x;
            sum.y += by * pair[u].y;
          }
      }
      queued = 0;
      __syncwarp();
    }
    double total = 0;
    if (inside) {
      *kept = sum;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int own_rank = first + i + e;
        if (i + e < end && labels()[own_rank] == k && weight()[own_rank] >= 0)
          total += weight()[own_rank] * (e ? sum.y : sum.x);
      }
    }
    return total;
  }

  // what turns sums into distances, from the totals over all strips
  __device__ void make_factors() {
    const int strips = STRIPS / blocks;
    for (int k = thread; k < K; k += threads) {
      double total = 0;
      for (int strip = 0; strip < STRIPS; ++strip) {
        double* from = partial() + strip % strips * K + k;
        if constexpr (CLUSTER) from = map_shared(from, strip / strips);
        total += *from;
      }
      const double n = counts()[k];
      if constexpr (EUCLIDEAN) {
        factor()[k] = n > 0 ? 1 / n : 0;
        shift()[k] = n > 0 ? total / (n * n) : 0;
      } else {
        factor()[k] = n > 0 && total > n * n * zero_norm() ? 1 / sqrt(total) : 0;
      }
    }
    __syncthreads();
  }

  __device__ void store() {
    if (warp == 0) store_sizes(args, b, sizes());
    __syncthreads();
    for (int i = thread; i < R; i += threads) args.labels[b * C + i] = labels()[i];
    for (int k = warp; k < K; k += warps) store_members(args, b, k, labels(), R);
  }

  __device__ void run() {
    load();
    assign_to_seeds();
    repair();
    for (int64_t round = 0; round < args.iterations; ++round) {
      update(round == 0);
      __syncthreads();
      // before another block may tell its new labels
      for (int i = thread; i < R; i += threads) summed()[i] = labels()[i];
      sync();
      make_factors();
      assign_to_means();
      if (!repair()) break;
    }
    if (block == 0) store();
  }
};

}  // namespace vmtc::cuda
