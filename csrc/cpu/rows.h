// Vectorised loops over rows of features. A result depends on the operands alone: the order of
// every sum is fixed, whatever the thread count or the place of a row.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common.h"

namespace vmtc::rows {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();

inline Vec load(const float* x, int64_t n) { return n == W ? Vec::loadu(x) : Vec::loadu(x, n); }
inline void store(const Vec& v, float* x, int64_t n) { n == W ? v.store(x) : v.store(x, n); }

// body(i, n) for every vector of n <= W elements starting at i
template <typename Body>
inline void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + W <= count; i += W) body(i, W);
  if (i < count) body(i, count - i);
}

inline float sum_lanes(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

// sum over d of term, in four partial sums: step(sum, d, n) adds the n terms from d. Every PACE
// terms enough(sum so far) may end it early.
constexpr int64_t PACE = 8 * 4 * W;
template <typename Step, typename Enough>
inline float reduce(int64_t D, const Step& step, const Enough& enough) {
  Vec a(0.f), b(0.f), c(0.f), e(0.f);
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) {
    a = step(a, d, W);
    b = step(b, d + W, W);
    c = step(c, d + 2 * W, W);
    e = step(e, d + 3 * W, W);
    if (d % PACE == PACE - 4 * W && enough((a + b) + (c + e))) return sum_lanes((a + b) + (c + e));
  }
  for (; d < D; d += W) a = step(a, d, std::min(W, D - d));
  return sum_lanes((a + b) + (c + e));
}

template <typename Step>
inline float reduce(int64_t D, const Step& step) {
  return reduce(D, step, [](const Vec&) { return false; });
}

inline float dot(const float* a, const float* b, int64_t D) {
  return reduce(D, [&](const Vec& sum, int64_t d, int64_t n) {
    return at::vec::fmadd(load(a + d, n), load(b + d, n), sum);
  });
}

// |factor a - b|^2, or any value above limit once the sum exceeds it
inline float squared_distance(const float* a, float factor, const float* b, int64_t D,
                              float limit = std::numeric_limits<float>::infinity()) {
  const Vec f(factor);
  return reduce(
      D,
      [&](const Vec& sum, int64_t d, int64_t n) {
        const Vec difference = at::vec::fmsub(load(a + d, n), f, load(b + d, n));
        return at::vec::fmadd(difference, difference, sum);
      },
      [&](const Vec& sum) { return sum_lanes(sum) > limit; });
}

// out = factor x
inline void scale(const float* x, float factor, float* out, int64_t D) {
  each_vector(D, [&](int64_t d, int64_t n) { store(load(x + d, n) * Vec(factor), out + d, n); });
}

// out = float(x)
template <typename T>
inline void to_float(const T* x, float* out, int64_t D) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, x, D * sizeof(float));
  } else {
    using Half = at::vec::Vectorized<T>;
    for (int64_t d = 0; d < D; d += 2 * W) {
      const int64_t n = std::min(2 * W, D - d);
      const auto [low, high] = at::vec::convert_to_float<T>(Half::loadu(x + d, n));
      store(low, out + d, std::min(n, W));
      if (n > W) store(high, out + d + W, n - W);
    }
  }
}

// x as float32: itself, or converted into buffer
template <typename T>
inline const float* as_float(const T* x, float* buffer, int64_t D) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    to_float(x, buffer, D);
    return buffer;
  }
}

// sum_d a[d] float(b[d])
template <typename T>
inline float dot(const float* a, const T* b, int64_t D) {
  Vec low(0.f), high(0.f);
  for (int64_t d = 0; d < D; d += 2 * W) {
    const int64_t n = std::min(2 * W, D - d);
    const auto [l, h] =
        at::vec::convert_to_float<T>(n == 2 * W ? at::vec::Vectorized<T>::loadu(b + d)
                                                : at::vec::Vectorized<T>::loadu(b + d, n));
    low = at::vec::fmadd(load(a + d, std::min(n, W)), l, low);
    if (n > W) high = at::vec::fmadd(load(a + d + W, n - W), h, high);
  }
  return sum_lanes(low + high);
}

// out = T(x), rounded to nearest
template <typename T>
inline void from_float(const float* x, T* out, int64_t D) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, x, D * sizeof(float));
  } else {
    for (int64_t d = 0; d < D; d += 2 * W) {
      const int64_t n = std::min(2 * W, D - d);
      const Vec low = load(x + d, std::min(n, W));
      const Vec high = n > W ? load(x + d + W, n - W) : Vec(0.f);
      at::vec::convert_from_float<T>(low, high).store(out + d, n);
    }
  }
}

// out = sum of weight(i) row(i) over i < count, four rows at a time
template <typename Row, typename Weight>
inline void weighted_sum(int64_t count, const Row& row, const Weight& weight, float* out,
                         int64_t D) {
  std::fill_n(out, D, 0.f);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float *p = row(i), *q = row(i + 1), *r = row(i + 2), *s = row(i + 3);
    const Vec u(weight(i)), v(weight(i + 1)), w(weight(i + 2)), z(weight(i + 3));
    each_vector(D, [&](int64_t d, int64_t n) {
      const Vec left = at::vec::fmadd(u, load(p + d, n), v * load(q + d, n));
      const Vec right = at::vec::fmadd(w, load(r + d, n), z * load(s + d, n));
      store(load(out + d, n) + (left + right), out + d, n);
    });
  }
  for (; i < count; ++i) {
    const float* p = row(i);
    const Vec u(weight(i));
    each_vector(D, [&](int64_t d, int64_t n) {
      store(at::vec::fmadd(u, load(p + d, n), load(out + d, n)), out + d, n);
    });
  }
}

// sum += factor(i) row(i) over i < count, in float64: so that the mean of equal rows is that
// row, and the order of the rows hardly ever matters
template <typename Row, typename Factor>
inline void add_rows(int64_t count, const Row& row, const Factor& factor, double* sum, int64_t D) {
  // what is summed at a time stays in the first-level cache
  constexpr int64_t CHUNK = 1024;
  for (int64_t begin = 0; begin < D; begin += CHUNK) {
    const int64_t n = std::min(CHUNK, D - begin);
    double* out = sum + begin;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      const float *p = row(i) + begin, *q = row(i + 1) + begin;
      const float *r = row(i + 2) + begin, *s = row(i + 3) + begin;
      const double u = factor(i), v = factor(i + 1), w = factor(i + 2), z = factor(i + 3);
      for (int64_t d = 0; d < n; ++d)
        out[d] += (u * double(p[d]) + v * double(q[d])) + (w * double(r[d]) + z * double(s[d]));
    }
    for (; i < count; ++i) {
      const float* p = row(i) + begin;
      const double u = factor(i);
      for (int64_t d = 0; d < n; ++d) out[d] += u * double(p[d]);
    }
  }
}

// x = softmax(x)
inline void softmax(float* x, int64_t N) {
  const float top = at::vec::reduce_all<float>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, x, N);
  each_vector(N, [&](int64_t i, int64_t n) { store((load(x + i, n) - Vec(top)).exp(), x + i, n); });
  const float total =
      reduce(N, [&](const Vec& sum, int64_t i, int64_t n) { return sum + load(x + i, n); });
  scale(x, 1.f / total, x, N);
}

}  // namespace vmtc::rows
