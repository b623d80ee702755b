// What device code needs of CUDA, in plain C++ over emulator.h. There is no __shared__: all shared
// memory is dynamic, so that its bounds are known.
#pragma once

#define VMTC_EMULATOR 1

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

constexpr int warpSize = 32;

#define VMTC_HERE ::emulator::Location where = ::emulator::Location::current()

inline void __syncthreads(VMTC_HERE) {
  emulator::block_barrier(emulator::Reduction::none, 0, where);
}
inline int __syncthreads_count(int value, VMTC_HERE) {
  return emulator::block_barrier(emulator::Reduction::count, value, where);
}
inline int __syncthreads_and(int value, VMTC_HERE) {
  return emulator::block_barrier(emulator::Reduction::all, value, where);
}
inline int __syncthreads_or(int value, VMTC_HERE) {
  return emulator::block_barrier(emulator::Reduction::any, value, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, VMTC_HERE) {
  emulator::together(mask, "__syncwarp", 0, where, [](const auto&) { return 0; });
}

// the source lane of each shuffle, within groups of `width` lanes
template <typename T, typename Source>
T vmtc_shuffle(unsigned mask, const char* what, T value, const Source& source,
               emulator::Location where) {
  return emulator::together(mask, what, value, where, [&](const auto& of) {
    return of(source(int(emulator::current->lane)));
  });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, VMTC_HERE) {
  const auto from = [=](int lane) { return (lane & -width) | (source & (width - 1)); };
  return vmtc_shuffle(mask, "__shfl_sync", value, from, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, VMTC_HERE) {
  const auto from = [=](int lane) {
    return (lane ^ bits) < (lane & -width) + width ? lane ^ bits : lane;
  };
  return vmtc_shuffle(mask, "__shfl_xor_sync", value, from, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, VMTC_HERE) {
  const auto from = [=](int lane) {
    return lane - int(delta) >= (lane & -width) ? lane - int(delta) : lane;
  };
  return vmtc_shuffle(mask, "__shfl_up_sync", value, from, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, VMTC_HERE) {
  const auto from = [=](int lane) {
    return lane + int(delta) < (lane & -width) + width ? lane + int(delta) : lane;
  };
  return vmtc_shuffle(mask, "__shfl_down_sync", value, from, where);
}

// fold over the lanes of the mask, in ascending order
template <typename T, typename R, typename Fold>
R vmtc_fold(unsigned mask, const char* what, T value, R start, const Fold& fold,
            emulator::Location where) {
  return emulator::together(mask, what, value, where, [&](const auto& of) {
    R result = start;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const unsigned lane = std::countr_zero(rest);
      result = fold(result, of(lane), lane);
    }
    return result;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, VMTC_HERE) {
  const auto add = [](unsigned r, bool v, unsigned lane) { return r | unsigned(v) << lane; };
  return vmtc_fold(mask, "__ballot_sync", predicate != 0, 0u, add, where);
}
inline int __any_sync(unsigned mask, int predicate, VMTC_HERE) {
  const auto any = [](int r, bool v, unsigned) { return int(r || v); };
  return vmtc_fold(mask, "__any_sync", predicate != 0, 0, any, where);
}
inline int __all_sync(unsigned mask, int predicate, VMTC_HERE) {
  const auto all = [](int r, bool v, unsigned) { return int(r && v); };
  return vmtc_fold(mask, "__all_sync", predicate != 0, 1, all, where);
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, VMTC_HERE) {
  const auto same = [=](unsigned r, T v, unsigned lane) {
    return r | unsigned(std::memcmp(&v, &value, sizeof(T)) == 0) << lane;
  };
  return vmtc_fold(mask, "__match_any_sync", value, 0u, same, where);
}
// the device has these from compute capability 8.0 on
#define VMTC_EMULATOR_REDUCE(name, type, start, expression)                               \
  inline type name(unsigned mask, type value, VMTC_HERE) {                                \
    if (emulator::capability() < 80) emulator::fail(#name " needs capability 80", where); \
    const auto step = [](type a, type b, unsigned) -> type { return expression; };        \
    return vmtc_fold(mask, #name, value, type(start), step, where);                       \
  }
VMTC_EMULATOR_REDUCE(__reduce_add_sync, unsigned, 0, a + b)
VMTC_EMULATOR_REDUCE(__reduce_add_sync, int, 0, a + b)
VMTC_EMULATOR_REDUCE(__reduce_min_sync, unsigned, ~0u, a < b ? a : b)
VMTC_EMULATOR_REDUCE(__reduce_min_sync, int, 0x7fffffff, a < b ? a : b)
VMTC_EMULATOR_REDUCE(__reduce_max_sync, unsigned, 0, a > b ? a : b)
VMTC_EMULATOR_REDUCE(__reduce_max_sync, int, -0x7fffffff - 1, a > b ? a : b)
VMTC_EMULATOR_REDUCE(__reduce_or_sync, unsigned, 0, a | b)
VMTC_EMULATOR_REDUCE(__reduce_and_sync, unsigned, ~0u, a& b)
VMTC_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, 0, a ^ b)
#undef VMTC_EMULATOR_REDUCE

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap(VMTC_HERE) { emulator::fail("__trap", where); }
#undef VMTC_HERE

// no other thread runs meanwhile
template <typename T, typename Change>
T vmtc_atomic(T* address, const Change& change) {
  const T old = *address;
  *address = change(old);
  return old;
}
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return T(old - value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return T(old | value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return T(old & value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return vmtc_atomic(address, [=](T old) { return old == expected ? value : old; });
}

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
template <typename T, typename U>
  requires(std::is_arithmetic_v<T> && std::is_arithmetic_v<U> && !std::is_same_v<T, U>)
constexpr auto min(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return std::min(Common(a), Common(b));
}
template <typename T, typename U>
  requires(std::is_arithmetic_v<T> && std::is_arithmetic_v<U> && !std::is_same_v<T, U>)
constexpr auto max(T a, U b) {
  using Common = std::common_type_t<T, U>;
  return std::max(Common(a), Common(b));
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
// a result that the compiler may not fuse with the operation that takes it
template <typename T>
T vmtc_rounded(T x) {
  asm("" : "+x"(x));
  return x;
}
inline float __fadd_rn(float a, float b) { return vmtc_rounded(a + b); }
inline float __fsub_rn(float a, float b) { return vmtc_rounded(a - b); }
inline float __fmul_rn(float a, float b) { return vmtc_rounded(a * b); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return vmtc_rounded(a / b); }
inline float __fdividef(float a, float b) { return vmtc_rounded(a / b); }
inline float __frcp_rn(float x) { return vmtc_rounded(1 / x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return vmtc_rounded(a + b); }
inline double __dsub_rn(double a, double b) { return vmtc_rounded(a - b); }
inline double __dmul_rn(double a, double b) { return vmtc_rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return vmtc_rounded(a / b); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __double2float_rn(double x) { return float(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
// as the device computes them: the product with log2(e), or ln(2), is rounded
inline float __expf(float x) { return std::exp2(vmtc_rounded(x * 1.44269504f)); }
inline float __logf(float x) { return vmtc_rounded(std::log2(x)) * 0.693147181f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
