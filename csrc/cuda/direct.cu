#include <algorithm>
#include <cfloat>

#include "direct.h"
#include "grouping.cuh"
#include "segment_mean.h"

namespace vmtc::cuda {
namespace {

struct Memory {
  float *centroids, *own;  // [B, K, D], [B, C]
  int32_t* assigned;       // [B, C]: labels before they are repaired and compared with the former
  int32_t* moving;         // [B]: whether the last round changed a label

  Memory(const ClusterArgs& args, Workspace& workspace)
      : centroids(workspace.take<float>(args.B * args.K * args.D)),
        own(workspace.take<float>(args.B * args.C)),
        assigned(workspace.take<int32_t>(args.B * args.C)),
        moving(workspace.take<int32_t>(args.B)) {}
};

template <typename T>
__device__ __forceinline__ const T* row_of(const ClusterArgs& args, int64_t b, int rank) {
  return static_cast<const T*>(args.x.data) + b * args.x.image_stride +
         int64_t(args.rows[b * args.N + rank]) * args.x.row_stride;
}

__device__ __forceinline__ float zero_norm(const ClusterArgs& args) {
  return float(args.D) * FLT_MIN;
}

constexpr int PREPARE_WARPS = 8;

// scale of each token, a warp each; afterwards no label is known
template <typename T>
__global__ void __launch_bounds__(PREPARE_WARPS* WARP)
    prepare_kernel(ClusterArgs args, Memory memory) {
  const int64_t job = block_index() * PREPARE_WARPS + threadIdx.x / WARP;
  // an image without tokens has its flag too
  const int64_t jobs = max(args.C, int64_t(1)), b = job / jobs;
  if (b >= args.B) return;
  const int rank = int(job % jobs), lane = threadIdx.x % WARP;
  if (rank == 0 && lane == 0) memory.moving[b] = 1;
  if (rank >= args.counts[b]) return;
  const T* row = row_of<T>(args, b, rank);
  float norm = 0;
#pragma unroll 4
  for (int64_t d = lane; d < args.D; d += WARP) {
    const float x = to_float(row[d]);
    norm = fmaf(x, x, norm);
  }
  norm = warp_sum(norm);
  if (lane > 0) return;
  float scale = norm < INFINITY ? 1 : -1;
  if (args.metric == Metric::cosine && scale > 0)
    scale = norm > zero_norm(args) ? float(1 / sqrt(double(norm))) : 0;
  args.scale[job] = scale;
  args.labels[job] = -1;
}

constexpr int SEED_THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(SEED_THREADS) seed_kernel(ClusterArgs args, Memory memory) {
  const int64_t job = block_index();
  if (job >= args.B * args.K) return;
  const int64_t b = job / args.K, k = job % args.K, R = args.counts[b];
  if (R == 0) return;
  const int rank = int((2 * k + 1) * R / (2 * args.K));
  const T* row = row_of<T>(args, b, rank);
  const float scale = args.scale[b * args.C + rank];
  for (int64_t d = threadIdx.x; d < args.D; d += SEED_THREADS)
    memory.centroids[job * args.D + d] = scale > 0 ? to_float(row[d]) * scale : 0;
}

// Products of TILE tokens with TILE centroids, 4 x 4 a thread, DEPTH features at a time.
constexpr int TILE = 64, SIDE = TILE / 4, ASSIGN_THREADS = SIDE * SIDE, DEPTH = 16;
// sums of so many products are added up once more
constexpr int FLUSH = 128;

struct AssignShared {
  // eight rows that are neighbours lie in different banks
  float tokens[TILE][DEPTH + 4], centroids[TILE][DEPTH + 4];
};

template <typename T, bool EUCLIDEAN>
__global__ void __launch_bounds__(ASSIGN_THREADS)
    assign_kernel(ClusterArgs args, Memory memory, int64_t tiles) {
  AssignShared& shared = *shared_memory<AssignShared>();
  const int64_t b = block_index() / tiles;
  const int first = int(block_index() % tiles) * TILE, thread = threadIdx.x;
  if (b >= args.B || !memory.moving[b]) return;
  const int R = args.counts[b], K = int(args.K);
  if (first >= R) return;
  const int64_t D = args.D;
  const int row = thread / SIDE, column = thread % SIDE;
  const float* scales = args.scale + b * args.C;
  const float* centroids = memory.centroids + b * K * D;

  // each thread loads 4 features of one token and of one centroid
  const int loaded = thread / 4, part = thread % 4 * 4;
  const bool there = first + loaded < R && scales[first + loaded] >= 0;
  const T* token = there ? row_of<T>(args, b, first + loaded) : nullptr;

  float nearest[4];
  int label[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) nearest[i] = INFINITY, label[i] = 0;
  for (int first_k = 0; first_k < K; first_k += TILE) {
    const float* centroid =
        first_k + loaded < K ? centroids + int64_t(first_k + loaded) * D : nullptr;
    float total[4][4] = {}, sum[4][4] = {}, total_square[4] = {}, square[4] = {};
    for (int64_t first_d = 0; first_d < D; first_d += DEPTH) {
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t d = first_d + part + e;
        shared.tokens[loaded][part + e] = token && d < D ? to_float(token[d]) : 0;
        shared.centroids[loaded][part + e] = centroid && d < D ? centroid[d] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < DEPTH; d += 4) {
        Pack<float> x[4], c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = load_pack(&shared.tokens[row + i * SIDE][d]);
          c[i] = load_pack(&shared.centroids[column + i * SIDE][d]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (!EUCLIDEAN) square[j] = fmaf(c[j].value[e], c[j].value[e], square[j]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float apart = x[i].value[e] - c[j].value[e];
              sum[i][j] = EUCLIDEAN ? fmaf(apart, apart, sum[i][j])
                                    : fmaf(x[i].value[e], c[j].value[e], sum[i][j]);
            }
          }
      }
      if ((first_d + DEPTH) % FLUSH == 0 || first_d + DEPTH >= D) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total_square[j] += square[j];
          square[j] = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) total[i][j] += sum[i][j], sum[i][j] = 0;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = first + row + i * SIDE;
      const float scale = rank < R ? scales[rank] : -1;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = first_k + column + j * SIDE;
        float distance = total[i][j];
        if (!EUCLIDEAN)
          distance = total_square[j] > zero_norm(args)
                         ? 1 - scale * distance / sqrtf(total_square[j])
                         : 1.f;
        if (k < K && scale >= 0 && distance < nearest[i]) nearest[i] = distance, label[i] = k;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int bits = 1; bits < SIDE; bits *= 2) {
      const float other = __shfl_xor_sync(ALL_LANES, nearest[i], bits);
      const int other_k = __shfl_xor_sync(ALL_LANES, label[i], bits);
      if (other < nearest[i] || (other == nearest[i] && other_k < label[i]))
        nearest[i] = other, label[i] = other_k;
    }
    const int rank = first + row + i * SIDE;
    if (column == 0 && rank < R) {
      memory.assigned[b * args.C + rank] = label[i];
      memory.own[b * args.C + rank] = nearest[i];
    }
  }
}

constexpr int REPAIR_THREADS = 1024;

struct RepairShared {
  unsigned long long farthest[REPAIR_THREADS / WARP];
};

// One block an image: sizes, the token farthest from its centroid to each empty cluster, whether
// a label is another than before, offsets.
__global__ void __launch_bounds__(REPAIR_THREADS) repair_kernel(ClusterArgs args, Memory memory) {
  RepairShared& shared = *shared_memory<RepairShared>();
  int* sizes = reinterpret_cast<int*>(&shared + 1);
  const int64_t b = block_index();
  if (b >= args.B || !memory.moving[b]) return;
  const int R = args.counts[b], K = int(args.K);
  const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
  int32_t* assigned = memory.assigned + b * args.C;
  const float* own = memory.own + b * args.C;

  for (int k = thread; k < K; k += REPAIR_THREADS) sizes[k] = 0;
  __syncthreads();
  for (int i = thread; i < R; i += REPAIR_THREADS) atomicAdd(&sizes[assigned[i]], 1);
  __syncthreads();
  for (int k = 0; k < K; ++k) {
    if (sizes[k] > 0) continue;
    unsigned long long farthest = 0;
    for (int i = thread; i < R; i += REPAIR_THREADS)
      if (sizes[assigned[i]] >= 2) farthest = max(farthest, farness(own[i], i));
    farthest = warp_max(farthest);
    if (lane == 0) shared.farthest[warp] = farthest;
    __syncthreads();
    farthest = warp_max(shared.farthest[lane]);
    if (farthest == 0) break;
    const int i = rank_of(farthest);
    if (thread == 0) {
      --sizes[assigned[i]];
      sizes[k] = 1;
      assigned[i] = k;
    }
    __syncthreads();
  }
  __syncthreads();

  bool changed = false;
  for (int i = thread; i < R; i += REPAIR_THREADS) {
    changed |= args.labels[b * args.C + i] != assigned[i];
    args.labels[b * args.C + i] = assigned[i];
  }
  changed = __syncthreads_or(changed);
  if (thread == 0) memory.moving[b] = changed;
  if (warp == 0) store_sizes(args, b, sizes);
}

constexpr int MEMBERS_WARPS = 4;

// a warp has one cluster
__global__ void __launch_bounds__(MEMBERS_WARPS* WARP)
    members_kernel(ClusterArgs args, Memory memory) {
  const int64_t job = block_index() * MEMBERS_WARPS + threadIdx.x / WARP;
  if (job >= args.B * args.K) return;
  const int64_t b = job / args.K;
  if (memory.moving[b])
    store_members(args, b, int(job % args.K), args.labels + b * args.C, args.counts[b]);
}

template <typename T>
cudaError_t run(const ClusterArgs& args, const Memory& memory, cudaStream_t stream) {
  const int64_t tokens = args.B * std::max(args.C, int64_t(1)), clusters = args.B * args.K;
  const int64_t tiles = std::max(ceil_div(args.C, int64_t(TILE)), int64_t(1));
  const auto grid = [](int64_t jobs, int each) { return grid_of(ceil_div(jobs, int64_t(each))); };
  const size_t repair_bytes = sizeof(RepairShared) + args.K * sizeof(int);
  const auto assign = [&]() -> cudaError_t {
    const auto kernel =
        args.metric == Metric::euclidean ? assign_kernel<T, true> : assign_kernel<T, false>;
    if (const cudaError_t error =
            launch(kernel, {grid_of(args.B * tiles), ASSIGN_THREADS, sizeof(AssignShared), stream},
                   args, memory, tiles))
      return error;
    if (const cudaError_t error = launch(
            repair_kernel, {grid_of(args.B), REPAIR_THREADS, repair_bytes, stream}, args, memory))
      return error;
    return launch(members_kernel, {grid(clusters, MEMBERS_WARPS), MEMBERS_WARPS * WARP, 0, stream},
                  args, memory);
  };

  SegmentMeanArgs mean{};
  mean.x = args.x;
  mean.B = args.B, mean.N = args.N, mean.D = args.D, mean.C = args.C, mean.K = args.K;
  mean.rows = args.rows, mean.members = args.members, mean.offsets = args.offsets;
  mean.scale = args.scale;
  mean.means = memory.centroids;
  if (const cudaError_t error =
          launch(prepare_kernel<T>, {grid(tokens, PREPARE_WARPS), PREPARE_WARPS * WARP, 0, stream},
                 args, memory))
    return error;
  if (const cudaError_t error =
          launch(seed_kernel<T>, {grid_of(clusters), SEED_THREADS, 0, stream}, args, memory))
    return error;
  if (const cudaError_t error = assign()) return error;
  for (int64_t round = 0; round < args.iterations; ++round) {
    if (const cudaError_t error = segment_mean(mean, stream)) return error;
    if (const cudaError_t error = assign()) return error;
  }
  return cudaSuccess;
}

}  // namespace

size_t direct_workspace(const ClusterArgs& args) {
  Workspace workspace;
  Memory(args, workspace);
  return workspace.bytes();
}

cudaError_t direct(const ClusterArgs& args, cudaStream_t stream) {
  Workspace workspace(args.workspace);
  const Memory memory(args, workspace);
  return with_type(args.x.dtype,
                   [&](auto zero) { return run<decltype(zero)>(args, memory, stream); });
}

}  // namespace vmtc::cuda
