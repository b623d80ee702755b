#include "focus.cuh"
#include "focus_product.h"
#include "focus_softmax.h"

namespace vmtc::cuda {
namespace {

// A tile of scores; a thread has LANE_ROWS rows and LANE_COLUMNS columns of it.
constexpr int THREADS = 128, ROWS = 64, COLUMNS = 64, DEPTH = 16;
constexpr int LANE_ROWS = 8, LANE_COLUMNS = 4;
// 16 bytes more than the rows, so that stores of a column go to different banks
constexpr int STRIDE = ROWS + 4;
constexpr int LEFT = DEPTH * ROWS / THREADS, RIGHT = DEPTH * COLUMNS / THREADS;
constexpr int64_t MOST_BLOCKS = 1024;

struct Shared {
  float left[2][DEPTH][STRIDE];  // attention to text, transposed
  float right[2][DEPTH][COLUMNS];
  float total[ROWS];  // of the attention to text of each row
};

__global__ void __launch_bounds__(THREADS)
    product_kernel(FocusScoresArgs args, ToText to_text, int blocks) {
  Shared& shared = *shared_memory<Shared>();
  const Sequence& sequence = args.layout.sequence;
  const int64_t b = block_index() / blocks, L = sequence.L, Lq = sequence.Lq;
  if (b >= sequence.B) return;
  const int32_t* text_rows = args.layout.rows + b * Lq;
  const int32_t* text_at = args.layout.text_at + b * L;
  const int64_t rows = min(int64_t(args.layout.row_count[b]), to_text.first + to_text.chunk);
  const int64_t row_tiles =
      rows <= to_text.first ? 0 : ceil_div(rows - to_text.first, int64_t(ROWS));
  const int64_t column_tiles = ceil_div(args.I, int64_t(COLUMNS));
  const int64_t jobs = row_tiles * column_tiles * to_text.M;
  const int thread = threadIdx.x, lane = thread % WARP;
  const int my_row = thread / 16 * LANE_ROWS, my_column = thread % 16 * LANE_COLUMNS;

  for (int64_t job = block_index() % blocks; job < jobs; job += blocks) {
    const int64_t m = job % to_text.M, first_column = job / to_text.M % column_tiles * COLUMNS;
    const int64_t first_row = to_text.first + job / to_text.M / column_tiles * ROWS;
    const float* state = args.text_image + b * args.state_batch_stride + m * args.state_head_stride;
    // a row reads the text until its own, and so all of the tile together the most of these
    const auto texts_of = [&](int r) {
      const int64_t row = first_row + r;
      return row < rows ? texts_until(args.layout, b, position_of(sequence, b, text_rows[row])) : 0;
    };
    int depth = 0;
    for (int r = lane; r < ROWS; r += WARP) depth = max(depth, texts_of(r));
    depth = warp_max(depth);

    // half a row of the left tile, and one column of every second row of the right one
    const int left_row = thread / 2, left_begin = thread % 2 * LEFT;
    const int mine = texts_of(left_row);
    const float* attention =
        to_text.attention +
        ((b * to_text.M + m) * to_text.chunk + first_row - to_text.first + left_row) * L;
    const int right_column = thread % COLUMNS, right_begin = thread / COLUMNS;
    const int64_t column = first_column + right_column;
    float left[LEFT], right[RIGHT], total = 0;
    const auto load = [&](int base) {
#pragma unroll
      for (int i = 0; i < LEFT; ++i) {
        const int k = base + left_begin + i;
        left[i] = k < mine ? attention[k] : 0.f;
        total += left[i];
      }
#pragma unroll
      for (int i = 0; i < RIGHT; ++i) {
        const int k = base + right_begin + i * (THREADS / COLUMNS);
        right[i] =
            k < depth && column < args.I
                ? state[text_at[k] * args.state_row_stride + column * args.state_image_stride]
                : 0.f;
      }
    };
    float sum[LANE_ROWS][LANE_COLUMNS] = {};
    load(0);
    for (int base = 0, turn = 0; base < depth; base += DEPTH, turn ^= 1) {
#pragma unroll
      for (int i = 0; i < LEFT; ++i) shared.left[turn][left_begin + i][left_row] = left[i];
#pragma unroll
      for (int i = 0; i < RIGHT; ++i)
        shared.right[turn][right_begin + i * (THREADS / COLUMNS)][right_column] = right[i];
      // those of the turn before the last have been read: all have passed the barrier between
      __syncthreads();
      load(base + DEPTH);
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        float a[LANE_ROWS];
#pragma unroll
        for (int i = 0; i < LANE_ROWS; i += 4) {
          const Pack<float> pack = load_pack(&shared.left[turn][k][my_row + i]);
#pragma unroll
          for (int e = 0; e < 4; ++e) a[i + e] = pack.value[e];
        }
        const Pack<float> pack = load_pack(&shared.right[turn][k][my_column]);
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
          for (int j = 0; j < LANE_COLUMNS; ++j) sum[i][j] = fmaf(a[i], pack.value[j], sum[i][j]);
      }
    }
    total += __shfl_xor_sync(ALL_LANES, total, 1);
    if (thread % 2 == 0) shared.total[left_row] = total;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      const int64_t row = first_row + my_row + i;
      if (row >= rows) continue;
      const int64_t query = text_rows[row];
      const float whole = shared.total[my_row + i];
      const float divisor = args.renormalize && whole != 0 ? whole : 1.f;
      const float* own = state + position_of(sequence, b, query) * args.state_row_stride;
      float* scores = args.scores + ((b * to_text.M + m) * Lq + query) * args.I;
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        const int64_t rank = first_column + my_column + j;
        if (rank >= args.I) continue;
        float value = sum[i][j] / divisor;
        if (args.residual) value += own[rank * args.state_image_stride];
        scores[rank] = value;
      }
    }
    // the next job stores totals
    __syncthreads();
  }
}

// The same where there are few queries: a block has one of them and a column for each lane, and its
// warps share the text out.
constexpr int FEW_WARPS = 16, UNROLL = 8;

__global__ void __launch_bounds__(FEW_WARPS* WARP)
    few_kernel(FocusScoresArgs args, ToText to_text, int64_t jobs) {
  float* sums = shared_memory<float>();     // [FEW_WARPS, WARP]
  float* totals = sums + FEW_WARPS * WARP;  // [FEW_WARPS]
  const Sequence& sequence = args.layout.sequence;
  const int64_t L = sequence.L, Lq = sequence.Lq, job = block_index();
  if (job >= jobs) return;
  const int64_t tiles = ceil_div(args.I, int64_t(WARP));
  const int64_t row = job / tiles % Lq, m = job / tiles / Lq % to_text.M,
                b = job / tiles / Lq / to_text.M;
  if (row >= args.layout.row_count[b]) return;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t query = args.layout.rows[b * Lq + row];
  const int64_t rank = job % tiles * WARP + lane;
  const int position = position_of(sequence, b, query),
            depth = texts_until(args.layout, b, position);
  const float* attention = to_text.attention + ((b * to_text.M + m) * to_text.chunk + row) * L;
  const int32_t* text_at = args.layout.text_at + b * L;
  // no condition on the columns, so that all loads are under way before the first is used
  const float* state = args.text_image + b * args.state_batch_stride + m * args.state_head_stride +
                       min(rank, args.I - 1) * args.state_image_stride;
  float sum = 0, total = 0;
  for (int base = warp; base < depth; base += FEW_WARPS * UNROLL) {
    float left[UNROLL], right[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int k = min(base + u * FEW_WARPS, depth - 1);
      left[u] = attention[k];
      right[u] = state[text_at[k] * args.state_row_stride];
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (base + u * FEW_WARPS >= depth) break;
      sum = fmaf(left[u], right[u], sum);
      total += left[u];
    }
  }
  sums[warp * WARP + lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (warp != 0 || rank >= args.I) return;
  float value = 0, whole = 0;
#pragma unroll
  for (int w = 0; w < FEW_WARPS; ++w) {
    value += sums[w * WARP + lane];
    whole += totals[w];
  }
  if (args.renormalize && whole != 0) value /= whole;
  if (args.residual) value += state[position * args.state_row_stride];
  args.scores[((b * to_text.M + m) * Lq + query) * args.I + rank] = value;
}

}  // namespace

cudaError_t focus_product(const FocusScoresArgs& args, const ToText& to_text, cudaStream_t stream) {
  const Sequence& sequence = args.layout.sequence;
  if (few_rows(args)) {
    const int64_t jobs = sequence.B * to_text.M * sequence.Lq * ceil_div(args.I, int64_t(WARP));
    const size_t bytes = (FEW_WARPS * WARP + FEW_WARPS) * sizeof(float);
    return launch(few_kernel, {grid_of(jobs), FEW_WARPS * WARP, bytes, stream}, args, to_text,
                  jobs);
  }
  const int64_t rows = std::min(to_text.chunk, sequence.Lq - to_text.first);
  const int64_t jobs =
      ceil_div(rows, int64_t(ROWS)) * ceil_div(args.I, int64_t(COLUMNS)) * to_text.M;
  const int blocks = int(std::min(jobs, MOST_BLOCKS));
  return launch(product_kernel, {grid_of(sequence.B * blocks), THREADS, sizeof(Shared), stream},
                args, to_text, blocks);
}

}  // namespace vmtc::cuda
