#include "attention_tile.cuh"
#include "common.cuh"
#include "token_importance.h"

namespace vmtc::cuda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// One query (cls_index): a part is so many keys of one head. Fixed, so that the order of every sum
// is.
constexpr int64_t PART = 256;
// keys that a group of lanes has under way
constexpr int UNROLL = 4;

// of a set of logits: the largest, and the sum of exp(logit - largest)
struct Softmax {
  float largest, sum;
};

struct Buffers {
  float* logits;     // [B, H, N], or what each head gives
  Softmax* softmax;  // [B, H, parts], or [B, H, N] with 1 / sum
};

Buffers carve(Workspace& workspace, int64_t B, int64_t H, int64_t N, bool one_query) {
  float* logits = workspace.take<float>(B * H * N);
  return {logits, workspace.take<Softmax>(B * H * (one_query ? ceil_div(N, PART) : N))};
}

template <typename T, int VEC>
__device__ __forceinline__ void load(const T* from, T (&to)[VEC]) {
  if constexpr (VEC == 1) {
    to[0] = *from;
  } else {
    const Pack<T> pack = load_pack(from);
#pragma unroll
    for (int e = 0; e < VEC; ++e) to[e] = pack.value[e];
  }
}

// logits of one query with one part of the keys of a head, LANES lanes a key
template <typename T, int VEC, int LANES>
__global__ void __launch_bounds__(THREADS)
    logits_kernel(TokenImportanceArgs args, Buffers buffers, int64_t parts) {
  float* logits = shared_memory<float>();  // [PART]
  float* partial = logits + PART;          // [WARPS], for the largest and for the sum
  float* query = partial + 2 * WARPS;      // [d], scaled, with zeros up to a whole round of lanes
  const int64_t d = args.d, N = args.N, job = block_index();
  if (job >= args.B * args.H * parts) return;
  const int64_t head = job / parts, part = job % parts, b = head / args.H, h = head % args.H;
  const int thread = threadIdx.x, lane = thread % LANES;
  const int64_t begin = part * PART;
  const int count = int(min(N - begin, PART));
  const T* q = static_cast<const T*>(args.q.data) + b * args.q.image_stride +
               h * args.q.head_stride + args.cls_index * args.q.row_stride;
  const T* keys = static_cast<const T*>(args.k.data) + b * args.k.image_stride +
                  h * args.k.head_stride + begin * args.k.row_stride;

  constexpr int ROUND = LANES * VEC, GROUPS = THREADS / LANES;
#pragma unroll 1
  for (int64_t i = thread; i < ceil_div(d, int64_t(ROUND)) * ROUND; i += THREADS)
    query[i] = i < d ? args.scale * to_float(q[i]) : 0.f;
  __syncthreads();

  float first[VEC];
#pragma unroll
  for (int e = 0; e < VEC; ++e) first[e] = query[lane * VEC + e];
  for (int base = thread / LANES; base < PART; base += GROUPS * UNROLL) {
    // no condition on the loads, so that all are under way before the first is used: what is read
    // twice or beyond the features is not taken
    const T* key[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      key[u] = keys + min(base + u * GROUPS, count - 1) * args.k.row_stride;
    float sum[UNROLL] = {};
    for (int64_t round = 0; round < d; round += ROUND) {
      const int64_t at = round + lane * VEC;
      const bool inside = at < d;
      T element[UNROLL][VEC];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) load<T, VEC>(key[u] + (inside ? at : 0), element[u]);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        float next = sum[u];
#pragma unroll
        for (int e = 0; e < VEC; ++e)
          next = fmaf(to_float(element[u][e]), round == 0 ? first[e] : query[at + e], next);
        sum[u] = inside ? next : sum[u];
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int bits = LANES / 2; bits > 0; bits /= 2)
        sum[u] += __shfl_xor_sync(ALL_LANES, sum[u], bits);
      if (lane == 0) logits[base + u * GROUPS] = sum[u];
    }
  }
  __syncthreads();

  float largest = -INFINITY;
#pragma unroll
  for (int i = thread; i < PART; i += THREADS) {
    if (i >= count) break;
    largest = fmaxf(largest, logits[i]);
    buffers.logits[head * N + begin + i] = logits[i];
  }
  largest = warp_max(largest);
  if (thread % WARP == 0) partial[thread / WARP] = largest;
  __syncthreads();
  largest = fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
  float sum = 0;
#pragma unroll
  for (int i = thread; i < PART; i += THREADS)
    if (i < count) sum += expf(logits[i] - largest);
  sum = warp_sum(sum);
  if (thread % WARP == 0) partial[WARPS + thread / WARP] = sum;
  __syncthreads();
  if (thread == 0) {
    const float* sums = partial + WARPS;
    buffers.softmax[job] = {largest, (sums[0] + sums[1]) + (sums[2] + sums[3])};
  }
}

// the mean over heads of what each gives, from logits the softmax first
template <bool FROM_LOGITS>
__global__ void __launch_bounds__(THREADS)
    heads_kernel(TokenImportanceArgs args, Buffers buffers, int64_t parts, float share) {
  Softmax* whole = shared_memory<Softmax>();  // [H], with share / sum
  const int64_t tiles = ceil_div(args.N, int64_t(THREADS)), job = block_index();
  if (job >= args.B * tiles) return;
  const int64_t b = job / tiles, i = job % tiles * THREADS + threadIdx.x, H = args.H, N = args.N;
  if constexpr (FROM_LOGITS) {
#pragma unroll 1
    for (int64_t h = threadIdx.x; h < H; h += THREADS) {
      const Softmax* part = buffers.softmax + (b * H + h) * parts;
      float largest = -INFINITY, sum = 0;
#pragma unroll 1
      for (int64_t p = 0; p < parts; ++p) largest = fmaxf(largest, part[p].largest);
#pragma unroll 1
      for (int64_t p = 0; p < parts; ++p) sum += part[p].sum * expf(part[p].largest - largest);
      whole[h] = {largest, share / sum};
    }
    __syncthreads();
  }
  if (i >= N) return;
  const float* given = buffers.logits + b * H * N + i;
  float sum = 0;
#pragma unroll 4
  for (int64_t h = 0; h < H; ++h) {
    const float value = given[h * N];
    sum += FROM_LOGITS ? expf(value - whole[h].largest) * whole[h].sum : value;
  }
  args.importance[b * N + i] = FROM_LOGITS ? sum : sum * share;
}

enum class Pass { softmax, columns };

// One tile of rows of a head against all rows of the other operand. softmax: the rows are queries,
// of each the softmax over its logits. columns: the rows are keys, of each the attention of all
// queries to it, added up.
// Four blocks a multiprocessor: left alone, the compiler spills registers of compute capability 7.5
// to make room for more.
template <typename T, Pass PASS>
__global__ void __launch_bounds__(AttentionTile<T>::THREADS, 4)
    attention_kernel(TokenImportanceArgs args, Buffers buffers, bool packed) {
  using Tile = AttentionTile<T>;
  char* shared = shared_memory<char>();
  Softmax* stored = reinterpret_cast<Softmax*>(shared + Tile::SHARED_BYTES);  // [2, COLUMNS]
  const int64_t N = args.N, tiles = ceil_div(N, int64_t(Tile::ROWS)), job = block_index();
  if (job >= args.B * args.H * tiles) return;
  const int64_t head = job / tiles, b = head / args.H, h = head % args.H;
  const int64_t first_row = job % tiles * Tile::ROWS;
  const auto of = [&](const Heads& heads) {
    return static_cast<const T*>(heads.data) + b * heads.image_stride + h * heads.head_stride;
  };
  const Heads &rows = PASS == Pass::softmax ? args.q : args.k,
              &columns = PASS == Pass::softmax ? args.k : args.q;

  float largest[Tile::LANE_ROWS], sum[Tile::LANE_ROWS];
#pragma unroll
  for (int i = 0; i < Tile::LANE_ROWS; ++i) {
    largest[i] = -INFINITY;
    sum[i] = 0;
  }
  Tile tile(shared, of(rows), rows.row_stride, first_row, of(columns), columns.row_stride, N,
            args.d, packed);
  for (int64_t first = 0; first < N; first += Tile::COLUMNS) {
    // two in turn: a warp that is ahead may be here while another still reads those before
    Softmax* queries = stored + first / Tile::COLUMNS % 2 * Tile::COLUMNS;
    if constexpr (PASS == Pass::columns) {
      if (threadIdx.x < Tile::COLUMNS) {
        const int64_t query = first + threadIdx.x;
        queries[threadIdx.x] = query < N ? buffers.softmax[head * N + query] : Softmax{0.f, 0.f};
      }
    }
    float s[Tile::LANE_ROWS][Tile::LANE_COLUMNS];
    tile.products(s);
#pragma unroll
    for (int i = 0; i < Tile::LANE_ROWS; ++i) {
      if constexpr (PASS == Pass::softmax) {
        float most = largest[i];
#pragma unroll
        for (int j = 0; j < Tile::LANE_COLUMNS; ++j) {
          s[i][j] = first + tile.column(j) < N ? s[i][j] * args.scale : -INFINITY;
          most = fmaxf(most, s[i][j]);
        }
        // a lane may have seen no column yet
        const float base = most == -INFINITY ? 0.f : most;
        float here = 0;
#pragma unroll
        for (int j = 0; j < Tile::LANE_COLUMNS; ++j) here += exp_fast(s[i][j] - base);
        sum[i] = sum[i] * exp_fast(largest[i] - base) + here;
        largest[i] = most;
      } else {
        // tile by tile, so that the error of the sum stays that of short sums
        float here = 0;
#pragma unroll
        for (int j = 0; j < Tile::LANE_COLUMNS; ++j) {
          const Softmax query = queries[tile.column(j)];
          here += exp_fast(s[i][j] * args.scale - query.largest) * query.sum;
        }
        sum[i] += here;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::LANE_ROWS; ++i) {
    const int64_t row = first_row + tile.row(i);
    if constexpr (PASS == Pass::softmax) {
      float most = largest[i];
#pragma unroll
      for (int bits = Tile::ROW_LANES / 2; bits > 0; bits /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, bits));
      sum[i] *= largest[i] == -INFINITY ? 0.f : exp_fast(largest[i] - most);
      largest[i] = most;
    }
#pragma unroll
    for (int bits = Tile::ROW_LANES / 2; bits > 0; bits /= 2)
      sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], bits);
    if (row < N && threadIdx.x % Tile::ROW_LANES == 0) {
      if constexpr (PASS == Pass::softmax)
        buffers.softmax[head * N + row] = {largest[i], 1 / sum[i]};
      else
        buffers.logits[head * N + row] = sum[i];
    }
  }
}

bool in_packs(const Heads& heads, Dtype dtype, int64_t d) {
  return in_packs(Rows{heads.data, heads.image_stride, heads.row_stride, dtype}, d) &&
         heads.head_stride % int64_t(16 / size_of(dtype)) == 0;
}

template <typename T>
cudaError_t one_query(const TokenImportanceArgs& args, const Buffers& buffers,
                      cudaStream_t stream) {
  constexpr int VEC = Pack<T>::SIZE;
  const int64_t parts = ceil_div(args.N, PART), heads = args.B * args.H;
  const auto run = [&](auto kernel, int64_t round) {
    const int64_t padded = ceil_div(args.d, round) * round;
    const size_t bytes = (PART + 2 * WARPS + padded) * sizeof(float);
    return launch(kernel, {grid_of(heads * parts), THREADS, bytes, stream}, args, buffers, parts);
  };
  cudaError_t error;
  if (!in_packs(args.k, args.dtype, args.d))
    error = run(logits_kernel<T, 1, WARP>, WARP);
  else if (args.d <= 4 * VEC)
    error = run(logits_kernel<T, VEC, 4>, 4 * VEC);
  else if (args.d <= 8 * VEC)
    error = run(logits_kernel<T, VEC, 8>, 8 * VEC);
  else if (args.d <= 16 * VEC)
    error = run(logits_kernel<T, VEC, 16>, 16 * VEC);
  else
    error = run(logits_kernel<T, VEC, WARP>, WARP * VEC);
  if (error) return error;
  const int64_t tiles = ceil_div(args.N, int64_t(THREADS));
  return launch(heads_kernel<true>,
                {grid_of(args.B * tiles), THREADS, args.H * sizeof(Softmax), stream}, args, buffers,
                parts, 1.f / args.H);
}

template <typename T>
cudaError_t all_queries(const TokenImportanceArgs& args, const Buffers& buffers,
                        cudaStream_t stream) {
  using Tile = AttentionTile<T>;
  const bool packed = in_packs(args.q, args.dtype, args.d) && in_packs(args.k, args.dtype, args.d);
  const Shape shape{grid_of(args.B * args.H * ceil_div(args.N, int64_t(Tile::ROWS))), Tile::THREADS,
                    Tile::SHARED_BYTES + 2 * Tile::COLUMNS * sizeof(Softmax), stream};
  if (const cudaError_t error =
          launch(attention_kernel<T, Pass::softmax>, shape, args, buffers, packed))
    return error;
  if (const cudaError_t error =
          launch(attention_kernel<T, Pass::columns>, shape, args, buffers, packed))
    return error;
  const int64_t tiles = ceil_div(args.N, int64_t(THREADS));
  return launch(heads_kernel<false>, {grid_of(args.B * tiles), THREADS, 0, stream}, args, buffers,
                int64_t(0), 1.f / (float(args.H) * args.N));
}

}  // namespace

size_t token_importance_workspace(int64_t B, int64_t H, int64_t N, bool one_query) {
  Workspace workspace;
  carve(workspace, B, H, N, one_query);
  return workspace.bytes();
}

cudaError_t token_importance(const TokenImportanceArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.N == 0) return cudaSuccess;
  const bool one = args.cls_index >= 0;
  Workspace workspace(args.workspace);
  const Buffers buffers = carve(workspace, args.B, args.H, args.N, one);
  return with_type(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    return one ? one_query<T>(args, buffers, stream) : all_queries<T>(args, buffers, stream);
  });
}

}  // namespace vmtc::cuda
