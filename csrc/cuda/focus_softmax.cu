#include "focus.cuh"
#include "focus_softmax.h"
#include "focus_tile.cuh"

namespace vmtc::cuda {
namespace {

constexpr int64_t MOST_BLOCKS = 1024;

// Keys of a part, by the shape of one sequence alone: results do not depend on the batch. A
// multiple of every tile. Few rows have nothing but the parts to fill a GPU with.
int64_t part_of(const FocusScoresArgs& args) {
  const int64_t least = few_rows(args) ? 256 : 512, most = few_rows(args) ? 32 : 16;
  const int64_t share = ceil_div(args.layout.sequence.L, most);
  return ceil_div(std::max(share, least), int64_t(64)) * 64;
}

struct Plan {
  int part_tiles, stride;  // of a row in shared memory
  bool two, packed;        // two tiles of keys; all rows can be moved in packs
};

// Rows are pairs of a query and a head of one group, the heads of a query being neighbours. A
// block takes job after job of its sequence: how many there are depends on how many queries are
// text, which only the device knows.
template <typename T, int D>
__global__ void __launch_bounds__(FocusTile<T, D>::THREADS, FocusTile<T, D>::BLOCKS)
    softmax_kernel(FocusScoresArgs args, FocusSoftmax softmax, Plan plan, int blocks) {
  using Tile = FocusTile<T, D>;
  using Bits = typename KeyTile<Tile::KEYS>::Bits;
  T* queries = shared_memory<T>();               // [ROWS, stride]
  T* keys = queries + Tile::ROWS * plan.stride;  // [1 or 2, KEYS, stride]
  const Sequence& sequence = args.layout.sequence;
  const int64_t b = block_index() / blocks, share = args.H / args.G, Lq = sequence.Lq;
  if (b >= sequence.B) return;
  const int32_t* text_rows = args.layout.rows + b * Lq;
  const int64_t rows = (softmax.logits ? Lq : args.layout.row_count[b]) * share;
  const auto query_of = [&](int64_t row) {
    return softmax.logits ? row / share : int64_t(text_rows[row / share]);
  };
  const int64_t jobs = ceil_div(rows, int64_t(Tile::ROWS)) * args.G * softmax.parts;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, d = int(args.d);

  for (int64_t job = block_index() % blocks; job < jobs; job += blocks) {
    const int64_t group = job % args.G, part = job / args.G % softmax.parts,
                  first_row = job / args.G / softmax.parts * Tile::ROWS;
    const T* q = static_cast<const T*>(args.q.data) + b * args.q.image_stride +
                 group * share * args.q.head_stride;
    const T* k =
        static_cast<const T*>(args.k.data) + b * args.k.image_stride + group * args.k.head_stride;
    // every warp finds the last key of all rows of the block, so that no barrier is needed
    int last = -1, position[2];
    for (int r = lane; r < Tile::ROWS; r += WARP)
      if (first_row + r < rows) last = max(last, position_of(sequence, b, query_of(first_row + r)));
    last = warp_max(last);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + Tile::row(i);
      position[i] = row < rows ? position_of(sequence, b, query_of(row)) : -1;
    }
    const int begin = int(part) * plan.part_tiles;
    const int end = min(last / Tile::KEYS + 1, begin + plan.part_tiles);

    const auto load_keys = [&](int tile) {
      if (tile < end) {
        const Bits real = KeyTile<Tile::KEYS>(args.layout, b, tile).real() &
                          lowest<Bits>(last - tile * Tile::KEYS + 1);
        T* to = keys + (plan.two ? tile % 2 : 0) * Tile::KEYS * plan.stride;
        const int64_t stride = args.k.row_stride;
        Tile::template load<Tile::KEYS>(
            to, plan.stride, d, plan.packed, k + int64_t(tile) * Tile::KEYS * stride,
            [&](int r) { return real >> r & 1 ? r * stride : int64_t(-1); });
      }
      cp_async_commit();
    };
    // those of the job before have been read
    __syncthreads();
    if (begin < end)
      Tile::template load<Tile::ROWS>(queries, plan.stride, d, plan.packed, q, [&](int r) {
        const int64_t row = first_row + r;
        return row < rows ? row % share * args.q.head_stride + query_of(row) * args.q.row_stride
                          : int64_t(-1);
      });
    load_keys(begin);
    const auto store = [&](const float (&s)[Tile::COLUMNS][4], int i, int64_t row, int tile) {
      float* to = softmax.logits +
                  ((b * args.H + group * share + row % share) * Lq + row / share) * sequence.L;
#pragma unroll
      for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t key = int64_t(tile) * Tile::KEYS + Tile::column(n, e);
          if (key <= position[i]) to[key] = s[n][2 * i + e];
        }
    };
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const bool busy = first_row + warp * 16 < rows;
    for (int tile = begin; tile < end; ++tile) {
      if (plan.two) {
        load_keys(tile + 1);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();
      if (busy) {
        float s[Tile::COLUMNS][4];
        Tile::products(s, queries, keys + (plan.two ? tile % 2 : 0) * Tile::KEYS * plan.stride,
                       plan.stride, d);
        const Bits real = KeyTile<Tile::KEYS>(args.layout, b, tile).real();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Bits seen =
              (real & lowest<Bits>(position[i] - tile * Tile::KEYS + 1)) >> lane % 4 * 2;
          float most = largest[i];
#pragma unroll
          for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& logit = s[n][2 * i + e];
              logit = seen >> (8 * n + e) & 1 ? logit * args.scale : -INFINITY;
              most = fmaxf(most, logit);
            }
          // a lane may have seen no key yet
          const float base = most == -INFINITY ? 0.f : most;
          float here = 0;
#pragma unroll
          for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) here += exp_fast(s[n][e] - base);
          if (softmax.logits && position[i] >= 0) store(s, i, first_row + Tile::row(i), tile);
          sum[i] = sum[i] * exp_fast(largest[i] - base) + here;
          largest[i] = most;
        }
      }
      __syncthreads();
      if (!plan.two) load_keys(tile + 1);
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + Tile::row(i);
      const float most = row_max(largest[i]);
      const float whole =
          row_sum(sum[i] * (largest[i] == -INFINITY ? 0.f : exp_fast(largest[i] - most)));
      if (row < rows && lane % 4 == 0) {
        const int64_t at = (b * args.H + group * share + row % share) * Lq + row / share;
        softmax.partial[at * softmax.parts + part] = {most, whole};
      }
    }
  }
}

constexpr int COMBINE_THREADS = 128;

// the parts of each row, in ascending order; share: of each head in the mean
__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_kernel(FocusScoresArgs args, FocusSoftmax softmax, float share) {
  const int64_t Lq = args.layout.sequence.Lq;
  const int64_t at = block_index() * COMBINE_THREADS + threadIdx.x;
  if (at >= args.layout.sequence.B * args.H * Lq) return;
  if (!softmax.logits && at % Lq >= args.layout.row_count[at / Lq / args.H]) return;
  const Softmax* each = softmax.partial + at * softmax.parts;
  float largest = -INFINITY, sum = 0;
  for (int64_t p = 0; p < softmax.parts; ++p) largest = fmaxf(largest, each[p].largest);
  for (int64_t p = 0; p < softmax.parts; ++p)
    if (each[p].largest != -INFINITY || each[p].sum != 0)
      sum += each[p].sum * exp_fast(each[p].largest - largest);
  softmax.whole[at] = {largest, share / sum};
}

}  // namespace

FocusSoftmax carve_softmax(Workspace& workspace, const FocusScoresArgs& args) {
  const int64_t L = args.layout.sequence.L;
  const int64_t rows = args.layout.sequence.B * args.H * args.layout.sequence.Lq;
  FocusSoftmax softmax{};
  softmax.parts = std::max<int64_t>(ceil_div(L, part_of(args)), 1);
  softmax.partial = workspace.take<Softmax>(rows * softmax.parts);
  softmax.whole = workspace.take<Softmax>(rows);
  if (few_rows(args)) softmax.logits = workspace.take<float>(rows * L);
  return softmax;
}

cudaError_t focus_softmax(const FocusScoresArgs& args, const FocusSoftmax& softmax, float share,
                          cudaStream_t stream) {
  const Sequence& sequence = args.layout.sequence;
  const cudaError_t error = with_tile(args.dtype, args.d, [&](auto zero, auto most) {
    using T = decltype(zero);
    using Tile = FocusTile<T, most.value>;
    Plan plan{};
    plan.part_tiles = int(part_of(args) / Tile::KEYS);
    plan.stride = Tile::stride_of(args.d);
    plan.packed = in_packs(args.q, args.dtype, args.d) && in_packs(args.k, args.dtype, args.d);
    const size_t keys = Tile::KEYS * plan.stride * sizeof(T);
    size_t bytes = Tile::ROWS * plan.stride * sizeof(T) + keys;
    plan.two = bytes + keys <= most_shared_memory();
    if (plan.two) bytes += keys;
    const int64_t tiles = ceil_div(sequence.Lq * (args.H / args.G), int64_t(Tile::ROWS));
    const int blocks = int(std::min(tiles * args.G * softmax.parts, MOST_BLOCKS));
    return launch(softmax_kernel<T, most.value>,
                  {grid_of(sequence.B * blocks), Tile::THREADS, bytes, stream}, args, softmax, plan,
                  blocks);
  });
  if (error) return error;
  const int64_t rows = sequence.B * args.H * sequence.Lq;
  return launch(combine_kernel,
                {grid_of(ceil_div(rows, int64_t(COMBINE_THREADS))), COMBINE_THREADS, 0, stream},
                args, softmax, share);
}

}  // namespace vmtc::cuda
