#include "focus.cuh"
#include "focus_product.h"
#include "focus_scores.h"
#include "focus_softmax.h"
#include "focus_tile.cuh"

namespace vmtc::cuda {
namespace {

// The products of queries and keys are computed twice rather than kept, for the softmax and for the
// attention: tensor cores are faster than memory here. The attention is summed over heads in
// registers. Where there are few queries keys are worth more than logits, and these are kept.
struct Plan {
  int64_t M;
  int64_t chunk;  // rows of which the attention is kept at a time
  int stride;     // of a row in shared memory
  bool two, packed;
};

struct Buffers {
  FocusSoftmax softmax;
  float* to_text;  // [B, M, chunk, L], columns are ranks of text
};

constexpr int64_t MOST_ELEMENTS = int64_t(1) << 26, MOST_BLOCKS = 1024, TILE_ROWS = 64;

Plan plan_of(const FocusScoresArgs& args) {
  const Sequence& sequence = args.layout.sequence;
  Plan plan{};
  plan.M = args.per_head ? args.H : 1;
  // no result depends on it
  const int64_t most =
      MOST_ELEMENTS / std::max<int64_t>(sequence.B * plan.M * sequence.L, 1) / TILE_ROWS;
  plan.chunk = std::min(std::max<int64_t>(most, 1) * TILE_ROWS, sequence.Lq);
  return plan;
}

Buffers carve(Workspace& workspace, const FocusScoresArgs& args, const Plan& plan) {
  const Sequence& sequence = args.layout.sequence;
  const FocusSoftmax softmax = carve_softmax(workspace, args);
  return {softmax, workspace.take<float>(sequence.B * plan.M * plan.chunk * sequence.L)};
}

// where the attention of one text query to all keys goes
struct Row {
  float *to_text, *to_image;
  int64_t stride, I;  // of images

  __device__ Row(const FocusScoresArgs& args, const Buffers& buffers, const Plan& plan, int64_t b,
                 int64_t m, int64_t row, int position)
      : to_text(buffers.to_text + ((b * plan.M + m) * plan.chunk + row) * args.layout.sequence.L),
        to_image(args.text_image + b * args.state_batch_stride + m * args.state_head_stride +
                 position * args.state_row_stride),
        stride(args.state_image_stride),
        I(args.I) {}

  template <typename View>
  __device__ __forceinline__ void store(const View& view, int column, float value) const {
    using Bits = typename View::Bits;
    const Bits before = (Bits(1) << column) - 1;
    if (view.text >> column & 1) {
      to_text[view.first_text + count_bits(view.text & before)] = value;
    } else if (view.image >> column & 1) {
      const int rank = view.first_image + count_bits(view.image & before);
      if (rank < I) to_image[rank * stride] = value;
    }
  }

  // from the last tile of keys on: images that the sequence does not have
  template <typename View>
  __device__ __forceinline__ void clear_rest(const View& view, int lane, int lanes) const {
    for (int64_t rank = view.first_image + count_bits(view.image) + lane; rank < I; rank += lanes)
      to_image[rank * stride] = 0;
  }
};

// The attention of a tile of text queries, rows `first` and on, to a tile of keys.
template <typename T, int D>
__global__ void __launch_bounds__(FocusTile<T, D>::THREADS, FocusTile<T, D>::BLOCKS)
    attention_kernel(FocusScoresArgs args, Buffers buffers, Plan plan, int64_t first, int blocks) {
  using Tile = FocusTile<T, D>;
  using Keys = KeyTile<Tile::KEYS>;
  using Bits = typename Keys::Bits;
  T* queries = shared_memory<T>();                                    // [1 or 2, ROWS, stride]
  T* keys = queries + (plan.two ? 2 : 1) * Tile::ROWS * plan.stride;  // [1 or 2, KEYS, stride]
  const Sequence& sequence = args.layout.sequence;
  const int64_t b = block_index() / blocks, share = args.H / args.G;
  const int64_t Lq = sequence.Lq;
  if (b >= sequence.B) return;
  const int32_t* text_rows = args.layout.rows + b * Lq;
  const int64_t count = args.layout.row_count[b], rows = min(count, first + plan.chunk);
  const int64_t key_tiles = ceil_div(sequence.L, int64_t(Tile::KEYS));
  const int64_t row_tiles = rows <= first ? 0 : ceil_div(rows - first, int64_t(Tile::ROWS));
  const int64_t jobs = row_tiles * key_tiles * plan.M;
  const int lane = threadIdx.x % WARP, d = int(args.d);

  for (int64_t job = block_index() % blocks; job < jobs; job += blocks) {
    const int64_t m = job % plan.M;
    const int tile = int(job / plan.M % key_tiles);
    const int64_t first_row = first + job / plan.M / key_tiles * Tile::ROWS;
    const Keys view(args.layout, b, tile);
    int last = -1, position[2];
    for (int r = lane; r < Tile::ROWS; r += WARP)
      if (first_row + r < rows)
        last = max(last, position_of(sequence, b, text_rows[first_row + r]));
    last = warp_max(last);
    Bits seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + Tile::row(i);
      position[i] = row < rows ? position_of(sequence, b, text_rows[row]) : -1;
      seen[i] = view.real() & lowest<Bits>(position[i] - tile * Tile::KEYS + 1);
    }
    const Bits real = view.real() & lowest<Bits>(last - tile * Tile::KEYS + 1);

    float sum[Tile::COLUMNS][4] = {};
    const int heads = real ? int(args.per_head ? 1 : args.H) : 0;
    const auto load_head = [&](int step) {
      if (step < heads) {
        const int64_t h = m + step, group = h / share;
        if (step == 0 || h % share == 0) {
          T* to = keys + (plan.two ? group % 2 : 0) * Tile::KEYS * plan.stride;
          const T* from = static_cast<const T*>(args.k.data) + b * args.k.image_stride +
                          group * args.k.head_stride;
          const int64_t stride = args.k.row_stride;
          Tile::template load<Tile::KEYS>(
              to, plan.stride, d, plan.packed, from + int64_t(tile) * Tile::KEYS * stride,
              [&](int r) { return real >> r & 1 ? r * stride : int64_t(-1); });
        }
        T* to = queries + (plan.two ? step % 2 : 0) * Tile::ROWS * plan.stride;
        const T* from =
            static_cast<const T*>(args.q.data) + b * args.q.image_stride + h * args.q.head_stride;
        Tile::template load<Tile::ROWS>(to, plan.stride, d, plan.packed, from, [&](int r) {
          return first_row + r < rows ? text_rows[first_row + r] * args.q.row_stride : int64_t(-1);
        });
      }
      cp_async_commit();
    };
    // those of the job before have been read
    __syncthreads();
    load_head(0);
    for (int step = 0; step < heads; ++step) {
      if (plan.two) {
        load_head(step + 1);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();
      const int64_t h = m + step;
      float s[Tile::COLUMNS][4];
      Tile::products(s, queries + (plan.two ? step % 2 : 0) * Tile::ROWS * plan.stride,
                     keys + (plan.two ? h / share % 2 : 0) * Tile::KEYS * plan.stride, plan.stride,
                     d);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = first_row + Tile::row(i);
        if (row >= rows) continue;
        const Softmax whole = buffers.softmax.whole[(b * args.H + h) * Lq + row];
#pragma unroll
        for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e)
            sum[n][e] += exp_fast(s[n][e] * args.scale - whole.largest) * whole.sum;
      }
      __syncthreads();
      if (!plan.two) load_head(step + 1);
    }
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + Tile::row(i);
      if (row >= rows) continue;
      const Row to(args, buffers, plan, b, m, row - first, position[i]);
#pragma unroll
      for (int n = 0; n < Tile::COLUMNS; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = Tile::column(n, e);
          to.store(view, column, seen[i] >> column & 1 ? sum[n][2 * i + e] : 0.f);
        }
      if (tile == key_tiles - 1) to.clear_rest(view, lane % 4, 4);
    }
  }
}

// The same from logits; one warp for 32 keys of one text query.
constexpr int FEW_WARPS = 4;

__global__ void __launch_bounds__(FEW_WARPS* WARP)
    few_kernel(FocusScoresArgs args, Buffers buffers, Plan plan, int64_t jobs) {
  const Sequence& sequence = args.layout.sequence;
  const int64_t L = sequence.L, Lq = sequence.Lq, tiles = ceil_div(L, int64_t(WARP));
  const int64_t job = block_index() * FEW_WARPS + threadIdx.x / WARP;
  if (job >= jobs) return;
  const int tile = int(job % tiles), lane = threadIdx.x % WARP;
  const int64_t row = job / tiles % Lq, m = job / tiles / Lq % plan.M,
                b = job / tiles / Lq / plan.M;
  if (row >= args.layout.row_count[b]) return;
  const int64_t query = args.layout.rows[b * Lq + row];
  const int position = position_of(sequence, b, query);
  const KeyTile<WARP> view(args.layout, b, tile);
  const int64_t key = int64_t(tile) * WARP + lane;
  float value = 0;
  if (key <= position && view.real() >> lane & 1) {
    const int64_t heads = args.per_head ? 1 : args.H;
#pragma unroll 4
    for (int64_t h = m; h < m + heads; ++h) {
      const int64_t at = (b * args.H + h) * Lq + query;
      const Softmax whole = buffers.softmax.whole[at];
      value += exp_fast(buffers.softmax.logits[at * L + key] - whole.largest) * whole.sum;
    }
  }
  const Row to(args, buffers, plan, b, m, row, position);
  to.store(view, lane, value);
  if (tile == tiles - 1) to.clear_rest(view, lane, WARP);
}

// the attention of the text queries from `first` on
cudaError_t attend(const FocusScoresArgs& args, const Buffers& buffers, Plan plan, int64_t first,
                   cudaStream_t stream) {
  const Sequence& sequence = args.layout.sequence;
  if (buffers.softmax.logits) {
    const int64_t jobs = sequence.B * plan.M * sequence.Lq * ceil_div(sequence.L, int64_t(WARP));
    return launch(few_kernel,
                  {grid_of(ceil_div(jobs, int64_t(FEW_WARPS))), FEW_WARPS * WARP, 0, stream}, args,
                  buffers, plan, jobs);
  }
  return with_tile(args.dtype, args.d, [&](auto zero, auto most) {
    using T = decltype(zero);
    using Tile = FocusTile<T, most.value>;
    plan.stride = Tile::stride_of(args.d);
    plan.packed = in_packs(args.q, args.dtype, args.d) && in_packs(args.k, args.dtype, args.d);
    size_t bytes = (Tile::ROWS + Tile::KEYS) * plan.stride * sizeof(T);
    plan.two = 2 * bytes <= most_shared_memory();
    if (plan.two) bytes *= 2;
    const int64_t row_tiles =
        ceil_div(std::min(plan.chunk, sequence.Lq - first), int64_t(Tile::ROWS));
    const int64_t jobs = row_tiles * ceil_div(sequence.L, int64_t(Tile::KEYS)) * plan.M;
    const int blocks = int(std::min(jobs, MOST_BLOCKS));
    return launch(attention_kernel<T, most.value>,
                  {grid_of(sequence.B * blocks), Tile::THREADS, bytes, stream}, args, buffers, plan,
                  first, blocks);
  });
}

}  // namespace

size_t focus_scores_workspace(const FocusScoresArgs& args) {
  Workspace workspace;
  carve(workspace, args, plan_of(args));
  return workspace.bytes();
}

const float* focus_logits(const FocusScoresArgs& args) {
  const Sequence& sequence = args.layout.sequence;
  if (sequence.B * sequence.Lq * args.I == 0) return nullptr;
  Workspace workspace(args.workspace);
  return carve_softmax(workspace, args).logits;
}

cudaError_t focus_scores(const FocusScoresArgs& args, cudaStream_t stream) {
  const Sequence& sequence = args.layout.sequence;
  const Plan plan = plan_of(args);
  const int64_t elements = sequence.B * plan.M * sequence.Lq * args.I;
  if (elements == 0) return cudaSuccess;
  Workspace workspace(args.workspace);
  const Buffers buffers = carve(workspace, args, plan);
  cudaError_t error = cudaSuccess;
  if (args.all_rows)
    error = reported(cudaMemsetAsync(args.scores, 0, elements * sizeof(float), stream));
  if (error) return error;
  error = focus_softmax(args, buffers.softmax, args.per_head ? 1.f : 1.f / args.H, stream);
  for (int64_t first = 0; first < sequence.Lq && !error; first += plan.chunk) {
    error = attend(args, buffers, plan, first, stream);
    if (!error) error = focus_product(args, {buffers.to_text, plan.M, first, plan.chunk}, stream);
  }
  return error;
}

}  // namespace vmtc::cuda
