#include "pairs.h"
#include "pairs_tile.cuh"

namespace vmtc::cuda {
namespace {

// below this part of the sum of both squared norms a squared distance has lost its digits
constexpr float CANCELLED = 1.f / 32;

template <typename T, bool PACKED>
__device__ __forceinline__ float squared_distance(const T* a, const T* b, int64_t D) {
  constexpr int EACH = Pack<T>::SIZE;
  float sum[4] = {};
  int64_t d = 0;
  for (; d + EACH <= D; d += EACH) {
    T left[EACH], right[EACH];
    if constexpr (PACKED) {
      const Pack<T> packs[2] = {load_pack(a + d), load_pack(b + d)};
#pragma unroll
      for (int e = 0; e < EACH; ++e) left[e] = packs[0].value[e], right[e] = packs[1].value[e];
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) left[e] = a[d + e], right[e] = b[d + e];
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const float apart = to_float(left[e]) - to_float(right[e]);
      sum[e % 4] = fmaf(apart, apart, sum[e % 4]);
    }
  }
  for (; d < D; ++d) {
    const float apart = to_float(a[d]) - to_float(b[d]);
    sum[0] = fmaf(apart, apart, sum[0]);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Without cp.async only small tiles are worth their registers, and bfloat16, which tensor cores do
// not know there, needs most.
template <typename T>
__host__ __device__ constexpr int largest_tile(int capability) {
  if (sizeof(T) == 4) return 64;
  return capability >= 80 ? 128 : std::is_same_v<T, bfloat16> ? 32 : 64;
}

// One tile on or below the diagonal a block; the tile above it is its mirror image.
template <typename T, int ROWS, bool EUCLIDEAN, bool PACKED>
__device__ __forceinline__ void make_tile(const PairsArgs& args, int64_t ld, int tiles) {
  using Tile = PairsTile<T, ROWS>;
  constexpr int THREADS = Tile::THREADS, STRIDE = Tile::PRODUCT_STRIDE;
  const int64_t b = block_index() / tiles;
  const int tile = int(block_index() % tiles), thread = threadIdx.x;
  if (b >= args.B) return;
  // the square root may be one off
  int row = int((sqrtf(8.f * tile + 1) - 1) / 2);
  while (row * (row + 1) / 2 > tile) --row;
  while ((row + 1) * (row + 2) / 2 <= tile) ++row;
  const int first_i = row * ROWS, first_j = (tile - row * (row + 1) / 2) * ROWS;
  const int R = args.counts[b];
  if (first_i >= R) return;
  const bool diagonal = first_i == first_j;
  const int32_t* positions = args.rows + b * args.N;
  const auto address = [&](int rank) {
    return static_cast<const T*>(args.x.data) + b * args.x.image_stride +
           int64_t(positions[rank]) * args.x.row_stride;
  };

  typename Tile::Source left, right;
  left.D = right.D = args.D;
  left.anywhere = right.anywhere = args.x.data;
#pragma unroll
  for (int pass = 0; pass < Tile::PASSES; ++pass) {
    const int here = thread / Tile::PACKS + THREADS / Tile::PACKS * pass;
    left.row[pass] = first_i + here < R ? address(first_i + here) : nullptr;
    right.row[pass] = first_j + here < R ? address(first_j + here) : nullptr;
  }
  auto& results = Tile::template run<PACKED, EUCLIDEAN>(left, right, diagonal);
  float* values = results.products;

  if constexpr (EUCLIDEAN) {
    for (int e = thread; e < ROWS * ROWS; e += THREADS) {
      const int i = e / ROWS, j = e % ROWS;
      float& value = values[i * STRIDE + j];
      const float both = results.left_norms[i] + results.right_norms[j];
      value = both - 2 * value;
      if (diagonal && i == j)
        value = both - both;
      else if (value < CANCELLED * both && first_i + i < R && first_j + j < R)
        value = squared_distance<T, PACKED>(address(first_i + i), address(first_j + j), args.D);
    }
    __syncthreads();
  }
  if (diagonal)
    for (int i = thread; i < ROWS; i += THREADS)
      if (first_i + i < R)
        args.norms[b * args.C + first_i + i] =
            EUCLIDEAN ? results.left_norms[i] : values[i * STRIDE + i];

  float* out = args.pairs + b * args.C * ld;
  // eight packs of each of four rows at a time: in both directions they lie in different banks
  const auto store = [&](int first_row, int first_column, int row_step, int column_step) {
    for (int e = thread; e < ROWS * ROWS / 4; e += THREADS) {
      const int block = e / WARP, lane = e % WARP;
      const int r = block / (ROWS / 32) * 4 + lane / 8;
      const int c = block % (ROWS / 32) * 32 + lane % 8 * 4;
      if (first_row + r >= R || first_column + c >= R) continue;
      Pack<float> pack;
#pragma unroll
      for (int q = 0; q < 4; ++q) pack.value[q] = values[r * row_step + (c + q) * column_step];
      store_pack(out + (first_row + r) * ld + first_column + c, pack);
    }
  };
  store(first_i, first_j, STRIDE, 1);
  if (!diagonal) store(first_j, first_i, 1, STRIDE);
}

template <typename T, int ROWS, bool EUCLIDEAN, bool PACKED>
__global__ void __launch_bounds__(PairsTile<T, ROWS>::THREADS)
    pairs_kernel(PairsArgs args, int64_t ld, int tiles) {
  // what no GPU of this capability is given needs no code for it
  if constexpr (VMTC_DEVICE_CODE == 0 || ROWS <= largest_tile<T>(VMTC_DEVICE_CODE / 10))
    make_tile<T, ROWS, EUCLIDEAN, PACKED>(args, ld, tiles);
  else
    no_such_code();
}

template <typename T, int ROWS>
cudaError_t launch_tiles(const PairsArgs& args, cudaStream_t stream) {
  using Tile = PairsTile<T, ROWS>;
  const int64_t edge = ceil_div(args.C, int64_t(ROWS)), tiles = edge * (edge + 1) / 2;
  const bool packed = in_packs(args.x, args.D);
  const auto kernel =
      args.metric == Metric::euclidean
          ? (packed ? pairs_kernel<T, ROWS, true, true> : pairs_kernel<T, ROWS, true, false>)
          : (packed ? pairs_kernel<T, ROWS, false, true> : pairs_kernel<T, ROWS, false, false>);
  return launch(kernel, {grid_of(args.B * tiles), Tile::THREADS, Tile::BYTES, stream}, args,
                pairs_stride(args.C), int(tiles));
}

// the largest tile that leaves no multiprocessor idle; no result depends on it
template <typename T>
int choose_tile(int64_t B, int64_t C, int capability, int processors, size_t most_shared) {
  const int largest = largest_tile<T>(capability);
  const auto tiles = [&](int64_t rows) {
    const int64_t edge = ceil_div(C, rows);
    return B * edge * (edge + 1) / 2;
  };
  if (largest == 128 && PairsTile<half, 128>::BYTES <= most_shared && tiles(128) >= 2 * processors)
    return 128;
  return largest >= 64 && tiles(64) >= processors ? 64 : 32;
}

}  // namespace

cudaError_t pairs(const PairsArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.C == 0) return cudaSuccess;
  int processors = 0;
  if (const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors))
    return error;
  return with_type(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int rows =
        choose_tile<T>(args.B, args.C, code_capability(pairs_kernel<T, 32, false, false>),
                       processors, most_shared_memory());
    if constexpr (sizeof(T) == 2)
      if (rows == 128) return launch_tiles<T, 128>(args, stream);
    return rows == 64 ? launch_tiles<T, 64>(args, stream) : launch_tiles<T, 32>(args, stream);
  });
}

}  // namespace vmtc::cuda
