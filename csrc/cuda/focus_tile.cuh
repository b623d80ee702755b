// Products of a tile of query rows with a tile of keys, and of their weights with the values.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "focus.cuh"
#include "mma.cuh"
#include "token_importance.h"

namespace vmtc::cuda {

template <typename T>
__device__ __forceinline__ uint32_t narrowed(float lower, float upper) {
  uint32_t word;
  if constexpr (std::is_same_v<T, half>) {
    const half2 pair = __floats2half2_rn(lower, upper);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lower, upper);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// D: the most features of queries, keys and values. Each warp has 16 rows. Products lie in the
// lanes as those of mma.cuh do, for float32 as well: with g = lane / 4 and t = lane % 4, s[n] holds
// (row g, column 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1).
template <typename T, int D>
struct FocusTile {
  static constexpr bool HALF = sizeof(T) == 2;
  // so that queries and one tile of keys fit into 64 KB
  static constexpr int WARPS = HALF || D < 256 ? 4 : 2, THREADS = WARPS * WARP, ROWS = 16 * WARPS;
  static constexpr int KEYS = (HALF ? 64 : 32) / (D < 256 ? 1 : 2), COLUMNS = KEYS / 8;
  static constexpr int PACK = Pack<T>::SIZE;
  // of a multiprocessor; more would make registers spill
  static constexpr int BLOCKS = D == 256 ? 1 : 2;
  // features that are multiplied before the next look at how many there are
  static constexpr int ROUND = 32;
  static_assert(D % ROUND == 0);

  // of a row in shared memory; the pack puts 8 rows into different banks
  static int stride_of(int64_t features) {
    return int(ceil_div(features, int64_t(ROUND))) * ROUND + PACK;
  }

  __device__ static int row(int i) {
    return threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4 + 8 * i;
  }
  __device__ static int column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }

  // Brings COUNT rows of `features` elements; row r begins at any + from(r), and is zeros where
  // that is negative. The elements after them, up to a whole ROUND, are zeros.
  template <int COUNT, typename From>
  __device__ __forceinline__ static void load(T* to, int stride, int features, bool packed,
                                              const T* any, const From& from) {
    constexpr int LANES = D / PACK, STEP = THREADS / LANES;
    static_assert(THREADS % LANES == 0 && COUNT % STEP == 0);
    const int e = threadIdx.x % LANES * PACK;
    if (e >= stride - PACK) return;
    // not more, or registers spill
#pragma unroll 4
    for (int i = 0; i < COUNT / STEP; ++i) {
      const int r = threadIdx.x / LANES + i * STEP;
      const int64_t begin = from(r);
      T* target = to + r * stride + e;
      if (packed) {
        const bool inside = begin >= 0 && e < features;
        cp_async<16>(target, inside ? any + begin + e : any, inside ? 16 : 0);
      } else {
#pragma unroll 1
        for (int k = 0; k < PACK; ++k)
          target[k] = begin >= 0 && e + k < features ? any[begin + e + k] : from_float<T>(0);
      }
    }
  }

  // s = rows of this warp times keys
  __device__ __forceinline__ static void products(float (&s)[COLUMNS][4], const T* rows,
                                                  const T* keys, int stride, int features) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = 0;
    if constexpr (HALF) {
      const T* a_row = rows + (16 * warp + lane % 16) * stride + lane / 16 * 8;
      const T* b_row = keys + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll 2
      for (int k = 0; k < features; k += 16) {
        uint32_t a[4];
        ldmatrix<4>(a, a_row + k);
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
          uint32_t b[4];
          ldmatrix<4>(b, b_row + n * 8 * stride + k);
          mma<T>(s[n], a, {b[0], b[1]});
          mma<T>(s[n + 1], a, {b[2], b[3]});
        }
      }
    } else {
      const T* a_row = rows + row(0) * stride;
      const T* b_row = keys + column(0, 0) * stride;
#pragma unroll 1
      for (int k = 0; k < features; k += PACK) {
        const Pack<T> a[2] = {load_pack(a_row + k), load_pack(a_row + 8 * stride + k)};
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Pack<T> b = load_pack(b_row + (8 * n + e) * stride + k);
#pragma unroll
            for (int x = 0; x < PACK; ++x)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                s[n][2 * i + e] = fmaf(a[i].value[x], b.value[x], s[n][2 * i + e]);
          }
      }
    }
  }

  // o += p times values, in the same layout; p is narrowed to T
  __device__ __forceinline__ static void accumulate(float (&o)[D / 8][4],
                                                    const float (&p)[COLUMNS][4], const T* values,
                                                    int stride, int features) {
    const int lane = threadIdx.x % WARP;
    if constexpr (HALF) {
      uint32_t a[KEYS / 16][4];
#pragma unroll
      for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float* pair = &p[2 * k + part / 2][part % 2 * 2];
          a[k][part] = narrowed<T>(pair[0], pair[1]);
        }
      const T* b_row = values + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < D / 8; n += ROUND / 8) {
        if (8 * n >= features) break;
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
          for (int m = n; m < n + ROUND / 8; m += 2) {
            uint32_t b[4];
            ldmatrix<4, true>(b, b_row + 16 * k * stride + 8 * m);
            mma<T>(o[m], a[k], {b[0], b[1]});
            mma<T>(o[m + 1], a[k], {b[2], b[3]});
          }
      }
    } else {
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        float weight[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          weight[i] = __shfl_sync(ALL_LANES, p[j / 8][2 * i + j % 2], lane / 4 * 4 + j % 8 / 2);
        const T* value = values + j * stride + column(0, 0);
#pragma unroll
        for (int n = 0; n < D / 8; n += ROUND / 8) {
          if (8 * n >= features) break;
#pragma unroll
          for (int m = n; m < n + ROUND / 8; ++m) {
            const float2 pair = *reinterpret_cast<const float2*>(value + 8 * m);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              o[m][2 * i] = fmaf(weight[i], pair.x, o[m][2 * i]);
              o[m][2 * i + 1] = fmaf(weight[i], pair.y, o[m][2 * i + 1]);
            }
          }
        }
      }
    }
  }
};

// the extreme and the sum over the 4 lanes that share a row
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// whether rows of d elements of every head can be moved in packs of 16 bytes
inline bool in_packs(const Heads& heads, Dtype dtype, int64_t d) {
  return in_packs(Rows{heads.data, heads.image_stride, heads.row_stride, dtype}, d) &&
         heads.head_stride % int64_t(16 / size_of(dtype)) == 0;
}

// f(T{}, integral_constant<int, D>) with the C++ type of dtype and the least D of so many features
template <typename F>
cudaError_t with_tile(Dtype dtype, int64_t features, const F& f) {
  return with_type(dtype, [&](auto zero) {
    if (features <= 64) return f(zero, std::integral_constant<int, 64>{});
    if (features <= 128) return f(zero, std::integral_constant<int, 128>{});
    return f(zero, std::integral_constant<int, 256>{});
  });
}

}  // namespace vmtc::cuda
