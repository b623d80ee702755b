// One tile of the products of rows with rows: a block multiplies ROWS gathered rows by ROWS others,
// while the next elements of both are on their way to shared memory.
#pragma once

#include "mma.cuh"

namespace vmtc::cuda {

template <typename T, int ROWS>
struct PairsTile {
  static constexpr bool ON_TENSOR_CORES = sizeof(T) == 2;
  static constexpr int EACH = Pack<T>::SIZE, PACKS = 8, DEPTH = PACKS * EACH;
  // rows of 144 bytes: eight of them lie in different banks
  static constexpr int STRIDE = DEPTH + EACH;
  static constexpr int THREADS = ON_TENSOR_CORES ? (ROWS == 128 ? 256 : 128) : ROWS * ROWS / 16;
  static constexpr int STAGES = ROWS == 32 ? 6 : 3;
  static constexpr int PASSES = ROWS * PACKS / THREADS;
  // products in the shared memory that the stages leave; reading columns is as good as rows
  static constexpr int PRODUCT_STRIDE = ROWS + 1;
  // tensor cores truncate as they add: their sums are short, and added in float32
  static constexpr int FLUSH = 512 / DEPTH;

  struct Operands {
    T left[ROWS * STRIDE], right[ROWS * STRIDE];
  };
  struct Results {
    float products[ROWS * PRODUCT_STRIDE], left_norms[ROWS], right_norms[ROWS];
  };
  static constexpr size_t BYTES = STAGES * sizeof(Operands);
  static_assert(sizeof(Results) <= BYTES && ROWS * PACKS % THREADS == 0);

  // which packs this thread copies: number `pack` of the rows row + THREADS / PACKS * pass
  struct Source {
    const T* row[PASSES];  // null: zeros
    int64_t D;
    const void* anywhere;  // in global memory, not read

    template <bool PACKED>
    __device__ __forceinline__ void copy(T* to, int64_t first) const {
      const int pack = threadIdx.x % PACKS, row_here = threadIdx.x / PACKS;
      const int64_t d = first + pack * EACH;
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        T* there = to + (row_here + THREADS / PACKS * pass) * STRIDE + pack * EACH;
        if constexpr (PACKED) {
          const bool inside = row[pass] && d < D;
          cp_async<16>(there, inside ? row[pass] + d : anywhere, inside * 16);
        } else {
#pragma unroll
          for (int e = 0; e < EACH; ++e)
            there[e] = row[pass] && d + e < D ? row[pass][d + e] : from_float<T>(0);
        }
      }
    }
  };

  // products of one warp on tensor cores
  struct Half {
    static constexpr int WARPS = THREADS / WARP / 2;
    static constexpr int HEIGHT = ROWS / 2, WIDTH = ROWS / WARPS, M = HEIGHT / 16, N = WIDTH / 8;
    float sum[M][N][4], norms[4];

    // each warp squares one of the blocks of 16 rows that it reads anyway, on each side
    __device__ static int row() { return threadIdx.x / WARP / WARPS; }
    __device__ static int column() { return threadIdx.x / WARP % WARPS; }
    __device__ static bool squares_left() { return column() < M; }
    __device__ static bool squares_right() { return row() < N / 2; }

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < M * N * 4; ++i) sum[i / (N * 4)][i / 4 % N][i % 4] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) norms[i] = 0;
    }
    __device__ __forceinline__ void add(const Half& other) {
#pragma unroll
      for (int i = 0; i < M * N * 4; ++i)
        sum[i / (N * 4)][i / 4 % N][i % 4] += other.sum[i / (N * 4)][i / 4 % N][i % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) norms[i] += other.norms[i];
    }

    template <bool SQUARES>
    __device__ __forceinline__ void multiply(const T* left, const T* right) {
      const int lane = threadIdx.x % WARP, g = lane / 4;
      float square[4][4];
      // the diagonal of each product below, of which a lane holds one element
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) square[i][e] = SQUARES && e % 2 == g % 2 ? norms[i] : 0;
      left += (row() * HEIGHT + lane % 16) * STRIDE + lane / 16 * 8;
      right += (column() * WIDTH + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[M][4], b[N][2];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix<4>(a[m], left + m * 16 * STRIDE + k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
          uint32_t both[4];
          ldmatrix<4>(both, right + n * 8 * STRIDE + k);
          b[n][0] = both[0], b[n][1] = both[1];
          b[n + 1][0] = both[2], b[n + 1][1] = both[3];
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < N; ++n) mma<T>(sum[m][n], a[m], b[n]);
        if constexpr (SQUARES) {
          // operands of both kinds differ in the order of their words only
#pragma unroll
          for (int m = 0; m < M; ++m)
            if (column() == m) {
              mma<T>(square[0], a[m], {a[m][0], a[m][2]});
              mma<T>(square[1], a[m], {a[m][1], a[m][3]});
            }
#pragma unroll
          for (int n = 0; n < N; n += 2)
            if (row() == n / 2) {
              const uint32_t rows[4] = {b[n][0], b[n + 1][0], b[n][1], b[n + 1][1]};
              mma<T>(square[2], rows, b[n]);
              mma<T>(square[3], rows, b[n + 1]);
            }
        }
      }
      if constexpr (SQUARES)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          norms[i] = g % 2 ? square[i][i % 2 * 2 + 1] : square[i][i % 2 * 2];
    }

    template <bool SQUARES>
    __device__ __forceinline__ void store(Results& out) const {
      const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            out.products[(row() * HEIGHT + m * 16 + g + e / 2 * 8) * PRODUCT_STRIDE +
                         column() * WIDTH + n * 8 + 2 * t + e % 2] = sum[m][n][e];
      if (SQUARES && t == g / 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (squares_left()) out.left_norms[row() * HEIGHT + column() * 16 + i * 8 + g] = norms[i];
          if (squares_right())
            out.right_norms[column() * WIDTH + row() * 16 + i * 8 + g] = norms[2 + i];
        }
      }
    }
  };

  // 4 x 4 products of one thread, in float32
  struct Single {
    static constexpr int SIDE = ROWS / 4;
    float sum[4][4], norm;

    __device__ __forceinline__ void clear() {
      norm = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = 0;
    }
    __device__ __forceinline__ void add(const Single& other) {
      norm += other.norm;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += other.sum[i / 4][i % 4];
    }

    template <bool SQUARES>
    __device__ __forceinline__ void multiply(const float* left, const float* right) {
      const int thread = threadIdx.x;
      const float* a_row = left + thread / SIDE * STRIDE;
      const float* b_row = right + thread % SIDE * STRIDE;
#pragma unroll
      for (int k = 0; k < DEPTH; k += 4) {
        Pack<float> a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = load_pack(a_row + i * SIDE * STRIDE + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = load_pack(b_row + i * SIDE * STRIDE + k);
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int i = 0; i < 16; ++i)
            sum[i / 4][i % 4] = fmaf(a[i / 4].value[e], b[i % 4].value[e], sum[i / 4][i % 4]);
      }
      if (SQUARES && thread < 2 * ROWS) {
        const float* row = (thread < ROWS ? left : right) + thread % ROWS * STRIDE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 4) {
          const Pack<float> x = load_pack(row + k);
#pragma unroll
          for (int e = 0; e < 4; ++e) norm = fmaf(x.value[e], x.value[e], norm);
        }
      }
    }

    template <bool SQUARES>
    __device__ __forceinline__ void store(Results& out) const {
      const int thread = threadIdx.x;
#pragma unroll
      for (int i = 0; i < 16; ++i)
        out.products[(thread / SIDE + i / 4 * SIDE) * PRODUCT_STRIDE + thread % SIDE +
                     i % 4 * SIDE] = sum[i / 4][i % 4];
      if (SQUARES && thread < 2 * ROWS)
        (thread < ROWS ? out.left_norms : out.right_norms)[thread % ROWS] = norm;
    }
  };

  using Sums = std::conditional_t<ON_TENSOR_CORES, Half, Single>;

  // Leaves the products in shared memory, for the whole block; if SQUARES, the squared norms of the
  // rows as well. same: both sides have the same rows.
  template <bool PACKED, bool SQUARES>
  __device__ static Results& run(const Source& left, const Source& right, bool same) {
    Operands* stages = shared_memory<Operands>();
    const int steps = int(ceil_div(left.D, int64_t(DEPTH)));
    const auto copy = [&](int step) {
      if (step < steps) {
        Operands& stage = stages[step % STAGES];
        left.template copy<PACKED>(stage.left, int64_t(step) * DEPTH);
        if (!same) right.template copy<PACKED>(stage.right, int64_t(step) * DEPTH);
      }
      cp_async_commit();
    };
    Sums total, part;
    total.clear();
    part.clear();
    for (int step = 0; step < STAGES - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      copy(step + STAGES - 1);
      const Operands& stage = stages[step % STAGES];
      part.template multiply<SQUARES>(stage.left, same ? stage.left : stage.right);
      if (step % FLUSH == FLUSH - 1) {
        total.add(part);
        part.clear();
      }
    }
    total.add(part);
    cp_async_wait<0>();
    __syncthreads();
    Results& results = *shared_memory<Results>();
    total.template store<SQUARES>(results);
    __syncthreads();
    return results;
  }
};

}  // namespace vmtc::cuda
