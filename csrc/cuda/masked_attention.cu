#include "focus.cuh"
#include "focus_tile.cuh"
#include "focus_views.cuh"
#include "masked_attention.h"

namespace vmtc::cuda {
namespace {

// Rows are pairs of a query and a head of one group, the heads of a query being neighbours, so that
// a tile of keys serves the whole group, in decoding too.
struct Plan {
  int64_t rows, row_tiles;  // of one group
  // where there are few rows, parts of the keys are blocks of their own
  int64_t parts;
  int part_tiles;
  int stride;        // of a row in shared memory
  bool two, packed;  // keys and values have a buffer each; all rows can be moved in packs
};

// of one part of the keys
struct Partial {
  float* out;           // [B, H, Lq, parts, dv], not divided by the sum
  float2* largest_sum;  // [B, H, Lq, parts]
};

constexpr int64_t LEAST_PART = 256, MOST_BLOCKS = 32;

// By the shape of one sequence alone: results do not depend on the batch.
template <typename Tile>
Plan plan_of(const MaskedAttentionArgs& args) {
  Plan plan{};
  plan.rows = args.layout.sequence.Lq * (args.H / args.G);
  plan.row_tiles = ceil_div(plan.rows, int64_t(Tile::ROWS));
  const int64_t L = args.layout.sequence.L;
  const int64_t most = std::max<int64_t>(MOST_BLOCKS / std::max<int64_t>(plan.row_tiles, 1), 1);
  const int64_t part = std::max(ceil_div(std::max<int64_t>(L, 1), most), LEAST_PART);
  plan.part_tiles = int(ceil_div(part, int64_t(Tile::KEYS)));
  plan.parts = std::max<int64_t>(ceil_div(L, int64_t(plan.part_tiles) * Tile::KEYS), 1);
  if (most == 1) plan.parts = 1;
  plan.stride = Tile::stride_of(std::max(args.d, args.dv));
  plan.packed = in_packs(args.q, args.dtype, args.d) && in_packs(args.k, args.dtype, args.d) &&
                in_packs(args.v, args.dtype, args.dv);
  return plan;
}

Partial carve(Workspace& workspace, const MaskedAttentionArgs& args, const Plan& plan) {
  if (plan.parts == 1) return {};
  const int64_t count = args.layout.sequence.B * args.H * args.layout.sequence.Lq * plan.parts;
  float* out = workspace.take<float>(count * args.dv);
  return {out, workspace.take<float2>(count)};
}

// One tile of rows of a group against the keys, or one part of them.
template <typename T, int D>
__global__ void __launch_bounds__(FocusTile<T, D>::THREADS, FocusTile<T, D>::BLOCKS)
    attention_kernel(MaskedAttentionArgs args, Partial partial, Plan plan) {
  using Tile = FocusTile<T, D>;
  using Bits = typename Views<T, D>::Bits;
  T* queries = shared_memory<T>();                               // [ROWS, stride]
  T* keys = queries + Tile::ROWS * plan.stride;                  // [KEYS, stride]
  T* values = keys + (plan.two ? Tile::KEYS * plan.stride : 0);  // the same
  Bits* unions = reinterpret_cast<Bits*>(values + Tile::KEYS * plan.stride);

  const int64_t B = args.layout.sequence.B, L = args.layout.sequence.L,
                Lq = args.layout.sequence.Lq, share = args.H / args.G;
  int64_t job = block_index();
  if (job >= B * args.G * plan.parts * plan.row_tiles) return;
  const int64_t group = job % args.G;
  job /= args.G;
  const int64_t b = job % B;
  job /= B;
  const int64_t part = job % plan.parts;
  // those that see most go first
  const int64_t first_row = (plan.row_tiles - 1 - job / plan.parts) * Tile::ROWS;

  const T* q = static_cast<const T*>(args.q.data) + b * args.q.image_stride +
               group * share * args.q.head_stride;
  const T* k =
      static_cast<const T*>(args.k.data) + b * args.k.image_stride + group * args.k.head_stride;
  const T* v =
      static_cast<const T*>(args.v.data) + b * args.v.image_stride + group * args.v.head_stride;
  const int d = int(args.d), dv = int(args.dv);
  Views<T, D> views(args, unions, b, group, first_row, plan.rows);
  const int begin = plan.parts == 1 ? 0 : int(part) * plan.part_tiles;
  const int tiles = views.last() < 0 ? 0 : views.last() / Tile::KEYS + 1;
  const int end = plan.parts == 1 ? tiles : min(tiles, begin + plan.part_tiles);

  // rows that none takes may hold anything, and are not read
  const auto load_tile = [&](T* to, const T* from, int64_t stride, int features,
                             const View<Bits>& view) {
    if (view.tile < end)
      Tile::template load<Tile::KEYS>(
          to, plan.stride, features, plan.packed, from + int64_t(view.tile) * Tile::KEYS * stride,
          [&](int r) { return view.keys >> r & 1 ? r * stride : int64_t(-1); });
    cp_async_commit();
  };
  const auto load_keys = [&](const View<Bits>& view) {
    if (args.logits)
      cp_async_commit();
    else
      load_tile(keys, k, args.k.row_stride, d, view);
  };
  View<Bits> next = views.find(begin, end);
  if (next.tile < end && !args.logits)
    Tile::template load<Tile::ROWS>(queries, plan.stride, d, plan.packed, q, [&](int r) {
      const int64_t row = first_row + r;
      return row < plan.rows ? row % share * args.q.head_stride + row / share * args.q.row_stride
                             : int64_t(-1);
    });
  load_keys(next);
  if (plan.two) load_tile(values, v, args.v.row_stride, dv, next);

  const float scale = args.logits ? 1.f : args.scale;
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float o[D / 8][4] = {}, s[Tile::COLUMNS][4];
  const auto read_logits = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = int(first_row) + Tile::row(i), heads = int(share);
      const int64_t at = (b * args.H + group * share + row % heads) * Lq + row / heads;
#pragma unroll
      for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t key = int64_t(tile) * Tile::KEYS + Tile::column(n, e);
          // those of keys that the row does not see may be anything
          s[n][2 * i + e] = row < plan.rows && key < L ? args.logits[at * L + key] : 0.f;
        }
    }
  };
  while (next.tile < end) {
    const View<Bits> now = next;
    // before the waits that follow
    if (args.logits && now.mine) read_logits(now.tile);
    next = views.find(now.tile + 1, end);
    if (plan.two)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    if (now.mine && !args.logits) Tile::products(s, queries, keys, plan.stride, d);
    __syncthreads();
    if (plan.two)
      load_keys(next);
    else
      load_tile(values, v, args.v.row_stride, dv, now);
    if (now.mine) {
#pragma unroll
      for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= scale;
      if (!now.plain) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int lane = threadIdx.x % WARP, shift = lane % 4 * 2;
          const Bits seen = __shfl_sync(ALL_LANES, now.seen, lane / 4 + 8 * i) >> shift;
          const Bits low = __shfl_sync(ALL_LANES, now.low, lane / 4 + 8 * i) >> shift;
#pragma unroll
          for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& logit = s[n][2 * i + e];
              if (low >> (8 * n + e) & 1) logit += args.penalty;
              if (!(seen >> (8 * n + e) & 1)) logit = -INFINITY;
            }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < Tile::COLUMNS; ++n)
          most = fmaxf(most, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
        most = fmaxf(largest[i], row_max(most));
        // a row may have seen no key yet
        const float base = most == -INFINITY ? 0.f : most;
        const float shrink = exp_fast(largest[i] - base);
        largest[i] = most;
        float here = 0;
#pragma unroll
        for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) {
            s[n][e] = exp_fast(s[n][e] - base);
            here += s[n][e];
          }
        sum[i] = sum[i] * shrink + here;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[n][2 * i] *= shrink;
          o[n][2 * i + 1] *= shrink;
        }
      }
    }
    if (plan.two)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    if (now.mine) Tile::accumulate(o, s, values, plan.stride, dv);
    __syncthreads();
    if (plan.two)
      load_tile(values, v, args.v.row_stride, dv, next);
    else
      load_keys(next);
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float whole = row_sum(sum[i]);
    const bool padding = views.position(i) < 0;
    const int64_t row = first_row + Tile::row(i);
    if (row >= plan.rows) continue;
    const int64_t at = (b * args.H + group * share + row % share) * Lq + row / share;
    const bool nothing = padding || whole == 0;
    float factor = 1;
    if (plan.parts == 1) {
      factor = nothing ? 0.f : 1 / whole;
      if (args.lse && threadIdx.x % 4 == 0)
        args.lse[at] = nothing ? -INFINITY : largest[i] + logf(whole);
    } else {
      if (threadIdx.x % 4 == 0)
        partial.largest_sum[at * plan.parts + part] =
            nothing ? float2{-INFINITY, 0.f} : float2{largest[i], whole};
      if (nothing) continue;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = Tile::column(n, e);
        const float value = nothing ? 0.f : o[n][2 * i + e] * factor;
        if (c >= dv) continue;
        if (plan.parts == 1)
          static_cast<T*>(args.out)[at * dv + c] = from_float<T>(value);
        else
          partial.out[(at * plan.parts + part) * dv + c] = value;
      }
  }
}

constexpr int COMBINE_WARPS = 4;

// a warp for each row: its parts, in ascending order
template <typename T>
__global__ void __launch_bounds__(COMBINE_WARPS* WARP)
    combine_kernel(MaskedAttentionArgs args, Partial partial, int64_t rows, int64_t parts) {
  const int64_t row = block_index() * COMBINE_WARPS + threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  if (row >= rows) return;
  const float2* each = partial.largest_sum + row * parts;
  float largest = -INFINITY, sum = 0;
  for (int64_t p = 0; p < parts; ++p) largest = fmaxf(largest, each[p].x);
  for (int64_t p = 0; p < parts; ++p)
    if (each[p].y != 0) sum += each[p].y * exp_fast(each[p].x - largest);
  if (lane == 0 && args.lse) args.lse[row] = sum == 0 ? -INFINITY : largest + logf(sum);
  for (int64_t c = lane; c < args.dv; c += WARP) {
    float value = 0;
    for (int64_t p = 0; p < parts; ++p)
      if (each[p].y != 0)
        value = fmaf(exp_fast(each[p].x - largest), partial.out[(row * parts + p) * args.dv + c],
                     value);
    static_cast<T*>(args.out)[row * args.dv + c] = from_float<T>(sum == 0 ? 0.f : value / sum);
  }
}

}  // namespace

size_t masked_attention_workspace(const MaskedAttentionArgs& args) {
  Workspace workspace;
  with_tile(args.dtype, std::max(args.d, args.dv), [&](auto zero, auto most) {
    carve(workspace, args, plan_of<FocusTile<decltype(zero), most.value>>(args));
    return cudaSuccess;
  });
  return workspace.bytes();
}

cudaError_t masked_attention(const MaskedAttentionArgs& args, cudaStream_t stream) {
  const Sequence& sequence = args.layout.sequence;
  if (sequence.B == 0 || sequence.Lq == 0) return cudaSuccess;
  return with_tile(args.dtype, std::max(args.d, args.dv), [&](auto zero, auto most) {
    using T = decltype(zero);
    using Tile = FocusTile<T, most.value>;
    Plan plan = plan_of<Tile>(args);
    Workspace workspace(args.workspace);
    const Partial partial = carve(workspace, args, plan);
    const size_t tile = Tile::KEYS * plan.stride * sizeof(T);
    size_t bytes = Tile::ROWS * plan.stride * sizeof(T) + 2 * Tile::WARPS * sizeof(uint64_t) + tile;
    plan.two = bytes + tile <= most_shared_memory();
    if (plan.two) bytes += tile;
    const int64_t blocks = sequence.B * args.G * plan.parts * plan.row_tiles;
    const cudaError_t error =
        launch(attention_kernel<T, most.value>, {grid_of(blocks), Tile::THREADS, bytes, stream},
               args, partial, plan);
    if (error || plan.parts == 1) return error;
    const int64_t rows = sequence.B * args.H * sequence.Lq;
    return launch(
        combine_kernel<T>,
        {grid_of(ceil_div(rows, int64_t(COMBINE_WARPS))), COMBINE_WARPS * WARP, 0, stream}, args,
        partial, rows, plan.parts);
  });
}

}  // namespace vmtc::cuda
