// Products of one tile of rows of a head with tile after tile of rows of another, as a block of
// four warps spreads them over its lanes: on tensor cores for half types, by FFMA for float32.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace vmtc::cuda {

// Brings the operands to shared memory, 128 bytes of each row at a time, the next ones while those
// before are multiplied. Rows from N on and elements from d on are zeros.
template <typename T>
class TileStream {
 public:
  static constexpr int THREADS = 128, ROWS = 64, COLUMNS = 64;
  static constexpr int PACK = Pack<T>::SIZE, CHUNK = 8 * PACK;
  // one pack more than the chunk, so that 8 rows lie in different banks
  static constexpr int STRIDE = CHUNK + PACK, TILE = ROWS * STRIDE;
  static constexpr size_t SHARED_BYTES = 4 * TILE * sizeof(T);

  __device__ TileStream(char* shared, const T* rows, int64_t row_stride, int64_t first_row,
                        const T* columns, int64_t column_stride, int64_t N, int64_t d, bool packed)
      : shared_(reinterpret_cast<T*>(shared)),
        rows_(rows),
        columns_(columns),
        row_stride_(row_stride),
        column_stride_(column_stride),
        first_row_(first_row),
        N_(N),
        d_(d),
        packed_(packed),
        chunks_(int(ceil_div(d, int64_t(CHUNK)))),
        chunk_(0),
        buffer_(0),
        first_column_(0) {
    load();
  }

 protected:
  // products of all chunks: multiply(rows, columns, elements of the chunk), in shared memory
  template <typename Multiply>
  __device__ __forceinline__ void each_chunk(const Multiply& multiply) {
    for (int c = 0; c < chunks_; ++c) {
      const int left = int(min(d_ - int64_t(c) * CHUNK, int64_t(CHUNK)));
      const T* rows = shared_ + (chunks_ == 1 ? 0 : buffer_) * TILE;
      const T* columns = shared_ + (2 + buffer_) * TILE;
      cp_async_wait<0>();
      // and the buffers of the chunk before are free
      __syncthreads();
      buffer_ ^= 1;
      if (++chunk_ == chunks_) {
        chunk_ = 0;
        first_column_ += COLUMNS;
      }
      if (first_column_ < N_) load();
      multiply(rows, columns, left);
    }
  }

 private:
  __device__ void load() {
    // a single chunk of the rows stays
    if (chunks_ > 1 || first_column_ == 0)
      load(shared_ + buffer_ * TILE, rows_, row_stride_, first_row_);
    load(shared_ + (2 + buffer_) * TILE, columns_, column_stride_, first_column_);
    cp_async_commit();
  }

  __device__ __forceinline__ void load(T* to, const T* from, int64_t stride, int64_t first) {
#pragma unroll
    for (int i = 0; i < ROWS * 8 / THREADS; ++i) {
      const int piece = threadIdx.x + i * THREADS, r = piece / 8, e = piece % 8 * PACK;
      const int64_t row = first + r, element = int64_t(chunk_) * CHUNK + e;
      const bool inside = row < N_ && element < d_;
      const T* source = inside ? from + row * stride + element : from;
      if (packed_) {
        cp_async<16>(to + r * STRIDE + e, source, inside ? 16 : 0);
      } else {
        const int count = inside ? int(min(d_ - element, int64_t(PACK))) : 0;
        for (int k = 0; k < PACK; ++k)
          to[r * STRIDE + e + k] = k < count ? source[k] : from_float<T>(0);
      }
    }
  }

  T* shared_;
  const T *rows_, *columns_;
  int64_t row_stride_, column_stride_, first_row_, N_, d_;
  bool packed_;
  int chunks_;
  // of the next load
  int chunk_, buffer_;
  int64_t first_column_;
};

// A lane has LANE_ROWS rows and LANE_COLUMNS columns of the tile; ROW_LANES neighbouring lanes have
// the same rows.
template <typename T>
class AttentionTile : public TileStream<T> {
  using Stream = TileStream<T>;

 public:
  static constexpr int LANE_ROWS = 2, LANE_COLUMNS = 16, ROW_LANES = 4;
  using Stream::Stream;

  __device__ static int row(int i) {
    return threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4 + 8 * i;
  }
  __device__ static int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }

  // of the next tile of columns
  __device__ __forceinline__ void products(float (&s)[LANE_ROWS][LANE_COLUMNS]) {
    constexpr int TILES = Stream::COLUMNS / 8, STRIDE = Stream::STRIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float c[TILES][4] = {};
    this->each_chunk([&](const T* rows, const T* columns, int left) {
      const T* a_row = rows + (16 * warp + lane % 16) * STRIDE + lane / 16 * 8;
      const T* b_row = columns + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < Stream::CHUNK; k += 16) {
        if (k >= left) break;
        uint32_t a[4];
        ldmatrix<4>(a, a_row + k);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
          uint32_t b[4];
          ldmatrix<4>(b, b_row + n * 8 * STRIDE + k);
          mma<T>(c[n], a, {b[0], b[1]});
          mma<T>(c[n + 1], a, {b[2], b[3]});
        }
      }
    });
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) s[i][j] = c[j / 2][2 * i + j % 2];
  }
};

template <>
class AttentionTile<float> : public TileStream<float> {
 public:
  static constexpr int LANE_ROWS = 4, LANE_COLUMNS = 8, ROW_LANES = 8;
  using TileStream::TileStream;

  __device__ static int row(int i) { return threadIdx.x / ROW_LANES * LANE_ROWS + i; }
  __device__ static int column(int j) { return threadIdx.x % ROW_LANES + ROW_LANES * j; }

  __device__ __forceinline__ void products(float (&s)[LANE_ROWS][LANE_COLUMNS]) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) s[i][j] = 0;
    each_chunk([&](const float* rows, const float* columns, int left) {
      const float* a_row = rows + row(0) * STRIDE;
      const float* b_row = columns + column(0) * STRIDE;
      for (int k = 0; k < left; k += PACK) {
        Pack<float> a[LANE_ROWS];
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) a[i] = load_pack(a_row + i * STRIDE + k);
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; ++j) {
          const Pack<float> b = load_pack(b_row + j * ROW_LANES * STRIDE + k);
#pragma unroll
          for (int e = 0; e < PACK; ++e)
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) s[i][j] = fmaf(a[i].value[e], b.value[e], s[i][j]);
        }
      }
    });
  }
};

}  // namespace vmtc::cuda
