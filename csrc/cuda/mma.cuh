// Products of small matrices on tensor cores: one warp, operands spread over its lanes.
#pragma once

#include "common.cuh"

namespace vmtc::cuda {

// Loads of 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row
// l % 8 of matrix l / 8 (16 bytes, aligned); it receives in r[m] the elements 2 (l % 4) and + 1 of
// row l / 4 of matrix m; transposed, of column l / 4.
template <int MATRICES, bool TRANSPOSED = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[MATRICES], const void* row) {
  static_assert(MATRICES == 2 || MATRICES == 4);
#ifdef VMTC_EMULATOR
  const auto where = emulator::Location::current();
  emulator::check_aligned(row, 16);
  const int lane = threadIdx.x % WARP;
  emulator::together(ALL_LANES, "ldmatrix", row, where, [&](const auto& of) {
    const auto element = [&](int m, int i, int j) -> uint32_t {
      return static_cast<const uint16_t*>(of(8 * m + i))[j];
    };
    const int i = lane / 4, j = lane % 4 * 2;
    for (int m = 0; m < MATRICES; ++m)
      r[m] = TRANSPOSED ? element(m, j, i) | element(m, j + 1, i) << 16
                        : element(m, i, j) | element(m, i, j + 1) << 16;
    return 0;
  });
#elif VMTC_DEVICE_CODE
  const unsigned address = shared_address(row);
  if constexpr (MATRICES == 4 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (MATRICES == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else if constexpr (!TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
#endif
}

template <typename T>
__device__ __forceinline__ float half_of_word(uint32_t word, int upper);
template <>
__device__ __forceinline__ float half_of_word<half>(uint32_t word, int upper) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * upper)));
}
template <>
__device__ __forceinline__ float half_of_word<bfloat16>(uint32_t word, int upper) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(word >> 16 * upper)));
}

// c += a b, a [16, 16] and b [16, 8] of half or bfloat16, c in float32. With g = lane / 4 and
// t = lane % 4, a word holding two elements that are neighbours in k:
//   a: (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)   b: (k 2t, column g), (2t + 8, g)
//   c: (row g, column 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef VMTC_EMULATOR
  struct Words {
    uint32_t a[4], b[2];
  };
  const Words mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto where = emulator::Location::current();
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  emulator::together(ALL_LANES, "mma", mine, where, [&](const auto& of) {
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, upper = k % 2;
      for (int i = 0; i < 4; ++i) {
        const Words& left = of(4 * g + from);
        const Words& right = of(4 * (2 * t + i % 2) + from);
        sum[i] += double(half_of_word<T>(left.a[k / 8 * 2 + i / 2], upper)) *
                  double(half_of_word<T>(right.b[k / 8], upper));
      }
    }
    for (int i = 0; i < 4; ++i) c[i] = float(sum[i]);
    return 0;
  });
#elif VMTC_DEVICE_CODE >= 800
  if constexpr (std::is_same_v<T, half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif VMTC_DEVICE_CODE
  if constexpr (std::is_same_v<T, half>) {
#pragma unroll
    for (int part = 0; part < 2; ++part)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
          " {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * part]), "r"(a[2 * part + 1]), "r"(b[part]));
  } else {
    // tensor cores of compute capability 7.5 know no bfloat16
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int from = 0; from < 4; ++from) {
        uint32_t left[2], right[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          left[i] = __shfl_sync(ALL_LANES, a[2 * part + i], 4 * g + from);
          right[i] = __shfl_sync(ALL_LANES, b[part], 4 * (2 * t + i) + from);
        }
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            c[i] = fmaf(half_of_word<T>(left[i / 2], upper), half_of_word<T>(right[i % 2], upper),
                        c[i]);
      }
  }
#endif
}

}  // namespace vmtc::cuda
