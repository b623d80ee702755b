#include "kmeans.h"
#include "merge_tokens.h"
#include "primary.h"
#include "segment_sum.cuh"

namespace vmtc::cuda {
namespace {

struct Clusters {
  int32_t* primary;  // [B, P]: positions, -1 where there is none
  int32_t* rows;     // [B, N]: position of the redundant token of each rank
  int32_t* counts;   // [B]
  int32_t* labels;   // [B, C], by rank
  int32_t* sizes;    // [B, K]
  int32_t* members;  // [B, C]: ranks, cluster by cluster
  int32_t* offsets;  // [B, K + 1]
  float* scale;      // [B, C], by rank
  int64_t C;         // the most redundant tokens that an image can have
};

template <typename Word, int COUNT>
struct Words {
  Pack<Word> pack;
  __device__ void load(const Word* from) { pack = load_pack(from); }
  __device__ void store(Word* to) const { store_global(to, pack); }
};

template <typename Word>
struct Words<Word, 1> {
  Word word;
  __device__ void load(const Word* from) { word = *from; }
  __device__ void store(Word* to) const { *to = word; }
};

// a row of D elements, zeros without one, moved as integers: bit for bit, whatever they mean
template <typename T, bool PACKED>
__device__ __forceinline__ void copy_row(const T* from, T* to, int64_t D) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* out = reinterpret_cast<Word*>(to);
  constexpr int EACH = PACKED ? Pack<Word>::SIZE : 1, UNROLL = 4;
  for (int64_t first = threadIdx.x % WARP * EACH; first < D; first += UNROLL * WARP * EACH) {
    // a store may change what the compiler reads after it, so all loads are before the stores
    Words<Word, EACH> words[UNROLL] = {};
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (from) words[u].load(source + min(first + u * WARP * EACH, D - EACH));
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (first + u * WARP * EACH < D) words[u].store(out + first + u * WARP * EACH);
  }
}

// the first blocks of an image merge a slice of a cluster each, the others copy a few primary
// tokens
template <typename T, bool PACKED>
__global__ void __launch_bounds__(SegmentSum<T>::THREADS)
    merge_kernel(MergeTokensArgs args, Clusters clusters, int64_t slices) {
  using Sum = SegmentSum<T>;
  auto& shared = *shared_memory<typename Sum::Shared>();
  const int64_t P = args.P, K = args.K, N = args.N, D = args.D;
  const int64_t merges = K * slices, jobs = merges + ceil_div(P, int64_t(Sum::WARPS));
  const int64_t b = block_index() / jobs, job = block_index() % jobs;
  if (b >= args.B) return;
  const int thread = threadIdx.x;
  const T* image = static_cast<const T*>(args.x.data) + b * args.x.image_stride;
  T* tokens = static_cast<T*>(args.tokens) + b * (P + K) * D;
  int32_t* sizes = args.sizes + b * (P + K);

  if (job >= merges) {
    const int64_t p = (job - merges) * Sum::WARPS + thread / WARP;
    if (p >= P) return;
    const int64_t position = clusters.primary[b * P + p];
    copy_row<T, PACKED>(position < 0 ? nullptr : image + position * args.x.row_stride,
                        tokens + p * D, D);
    if (thread % WARP == 0) sizes[p] = position >= 0;
    return;
  }

  const int64_t k = job / slices, slice = job % slices;
  const int32_t* offsets = clusters.offsets + b * (K + 1) + k;
  const int begin = offsets[0], count = offsets[1] - begin;
  const int32_t* members = clusters.members + b * clusters.C + begin;
  const auto position_of = [&](int j) { return int64_t(clusters.rows[b * N + members[j]]); };
  const auto positive_score = [&](int64_t position) {
    const int64_t at = b * args.score_image_stride + position * args.score_stride;
    float score = 0;
    switch (args.score_dtype) {
      case Dtype::float32:
        score = static_cast<const float*>(args.scores)[at];
        break;
      case Dtype::float16:
        score = to_float(static_cast<const half*>(args.scores)[at]);
        break;
      case Dtype::bfloat16:
        score = to_float(static_cast<const bfloat16*>(args.scores)[at]);
        break;
    }
    return score > 0 ? score : 0.f;
  };

  double total = 0;
  if (args.by_score) {
    // scores may add up beyond float32
    for (int j = thread; j < count; j += Sum::THREADS) total += positive_score(position_of(j));
    total = Sum::total(shared, total);
  }
  const bool uniform = !(total > 0);
  if (uniform) total = count;
  const auto member = [&](int j) -> WeightedRow {
    const int64_t position = position_of(j);
    if (slice == 0) args.owner[b * N + position] = int(P + k);
    const float weight = uniform ? 1.f : positive_score(position);
    return {position * args.x.row_stride, float(weight / total)};
  };
  TwoFloats sum[Sum::EACH];
  Sum::template run<PACKED>(shared, image, D, slice * Sum::WIDTH, count, member, sum);
  if (thread >= WARP) return;
  Sum::template store<PACKED>(tokens + (P + k) * D, D, slice * Sum::WIDTH,
                              [&](int e) { return sum[e].value(); });
  if (slice == 0 && thread == 0) sizes[P + k] = count;
}

cudaError_t finish(const MergeTokensArgs& args, const Clusters& clusters, cudaStream_t stream) {
  const int64_t slots = args.P + args.K;
  const bool packed = in_packs(args.x, args.D) &&
                      in_packs({args.tokens, slots * args.D, args.D, args.x.dtype}, args.D);
  return with_type(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = SegmentSum<T>;
    const int64_t slices = ceil_div(args.D, int64_t(Sum::WIDTH));
    const int64_t jobs = args.K * slices + ceil_div(args.P, int64_t(Sum::WARPS));
    return launch(packed ? merge_kernel<T, true> : merge_kernel<T, false>,
                  {grid_of(args.B * jobs), Sum::THREADS, sizeof(typename Sum::Shared), stream},
                  args, clusters, slices);
  });
}

Clusters carve(Workspace& workspace, const MergeTokensArgs& args) {
  const int64_t B = args.B, N = args.N, P = args.P, K = args.K;
  // where some are not valid, each of them may take the place of a primary token
  const int64_t C = args.valid ? N : max(N - P, int64_t(0));
  Clusters clusters{};
  clusters.C = C;
  clusters.primary = workspace.take<int32_t>(B * P);
  clusters.rows = workspace.take<int32_t>(B * N);
  clusters.counts = workspace.take<int32_t>(B);
  if (K == 0) return clusters;
  clusters.labels = workspace.take<int32_t>(B * C);
  clusters.sizes = workspace.take<int32_t>(B * K);
  clusters.members = workspace.take<int32_t>(B * C);
  clusters.offsets = workspace.take<int32_t>(B * (K + 1));
  clusters.scale = workspace.take<float>(B * C);
  return clusters;
}

ClusterArgs clustering(const MergeTokensArgs& args, const Clusters& clusters) {
  ClusterArgs out{};
  out.x = args.features;
  out.B = args.B, out.N = args.N, out.D = args.Df, out.C = clusters.C, out.K = args.K;
  out.iterations = args.iterations;
  out.metric = args.metric;
  out.rows = clusters.rows;
  out.counts = clusters.counts;
  out.labels = clusters.labels;
  out.sizes = clusters.sizes;
  out.members = clusters.members;
  out.offsets = clusters.offsets;
  out.scale = clusters.scale;
  return out;
}

}  // namespace

size_t merge_tokens_workspace(const MergeTokensArgs& args) {
  Workspace workspace;
  const Clusters clusters = carve(workspace, args);
  if (args.K > 0) workspace.take<char>(int64_t(cluster_workspace(clustering(args, clusters))));
  return workspace.bytes();
}

cudaError_t merge_tokens(const MergeTokensArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.P + args.K == 0) return cudaSuccess;
  Workspace workspace(args.workspace);
  const Clusters clusters = carve(workspace, args);
  PrimaryArgs primary{};
  primary.scores = args.scores;
  primary.score_image_stride = args.score_image_stride, primary.score_stride = args.score_stride;
  primary.score_dtype = args.score_dtype;
  primary.valid = args.valid;
  primary.valid_image_stride = args.valid_image_stride, primary.valid_stride = args.valid_stride;
  primary.B = args.B, primary.N = args.N, primary.P = args.P;
  primary.owner = args.owner;
  primary.primary = clusters.primary;
  primary.rows = clusters.rows;
  primary.counts = clusters.counts;
  if (const cudaError_t error = select_primary(primary, stream)) return error;
  if (args.K > 0) {
    ClusterArgs todo = clustering(args, clusters);
    todo.workspace = workspace.take<char>(int64_t(cluster_workspace(todo)));
    if (const cudaError_t error = cluster(todo, stream)) return error;
  }
  return finish(args, clusters, stream);
}

}  // namespace vmtc::cuda
