// __half: storage and conversions; arithmetic goes through float.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "vector_types.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)) {}
  __half(__half_raw raw) : bits(raw.x) {}
  operator float() const { return _cvtsh_ss(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 value) { return {value.x, value.y}; }
