// Attention of a few queries to the keys that they see, pairs inhibited by bits.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <bit>
#include <cmath>

#include "rows.h"
#include "sequence.h"

namespace vmtc {

// below so many rows a product reads its matrix row by row instead of calling BLAS
constexpr int64_t FEW = 8;
// keys at a time
constexpr int64_t KEYS = 512;
constexpr float NONE = -std::numeric_limits<float>::infinity();

inline at::Tensor matrix(const float* x, int64_t rows, int64_t columns, int64_t step) {
  return at::from_blob(const_cast<float*>(x), {rows, columns}, {step, 1}, at::kFloat);
}

// The rows of one head of keys or values: by a stride, or through a table of blocks.
template <typename scalar_t>
struct HeadRows {
  const scalar_t* base;
  int64_t step, width;
  const int32_t* table = nullptr;
  int64_t block = 1, block_step = 0;

  const scalar_t* row(int64_t j) const {
    if (!table) return base + j * step;
    return base + table[j / block] * block_step + j % block * step;
  }

  // rows [begin, end) as float32, and their step; those of padding are zeros if `clean`
  std::pair<const float*, int64_t> floats(int64_t begin, int64_t end, const Sequence& s, bool clean,
                                          std::vector<float>& storage) const {
    clean = clean && s.real_before[end] - s.real_before[begin] < end - begin;
    if constexpr (std::is_same_v<scalar_t, float>)
      if (!table && !clean) return {row(begin), step};
    storage.resize((end - begin) * width);
    for (int64_t j = begin; j < end; ++j) {
      float* out = storage.data() + (j - begin) * width;
      // a table may say nothing of padding
      if (s.kind[j] == padding)
        std::fill_n(out, width, 0.f);
      else
        rows::to_float(row(j), out, width);
    }
    return {storage.data(), width};
  }
};

// out [count, end - begin] = a [count, width] rows(begin..end)^T; columns of padding are arbitrary
template <typename scalar_t>
void multiply_keys(const float* a, int64_t count, const HeadRows<scalar_t>& keys, const Sequence& s,
                   int64_t begin, int64_t end, float* out, int64_t step,
                   std::vector<float>& storage) {
  const int64_t width = keys.width;
  if (count >= FEW) {
    const auto [k, k_step] = keys.floats(begin, end, s, false, storage);
    at::Tensor c = matrix(out, count, end - begin, step);
    at::mm_out(c, matrix(a, count, width, width), matrix(k, end - begin, width, k_step).t());
    return;
  }
  storage.resize(width);
  for (int64_t j = begin; j < end; ++j) {
    if (s.kind[j] == padding) continue;
    const float* k = rows::as_float(keys.row(j), storage.data(), width);
    for (int64_t i = 0; i < count; ++i)
      out[i * step + j - begin] = rows::dot(a + i * width, k, width);
  }
}

// sum [count, width] += p [count, end - begin] rows(begin..end); a row that none weighs is not read
template <typename scalar_t>
void add_values(const float* p, int64_t step, int64_t count, const HeadRows<scalar_t>& values,
                const Sequence& s, int64_t begin, int64_t end, float* sum,
                std::vector<float>& storage) {
  const int64_t width = values.width;
  if (count >= FEW) {
    const auto [v, v_step] = values.floats(begin, end, s, true, storage);
    at::Tensor c = matrix(sum, count, width, width);
    at::addmm_out(c, c, matrix(p, count, end - begin, step), matrix(v, end - begin, width, v_step));
    return;
  }
  storage.resize(width);
  for (int64_t j = begin; j < end; ++j) {
    bool weighed = false;
    for (int64_t i = 0; i < count; ++i) weighed = weighed || p[i * step + j - begin] != 0;
    if (!weighed) continue;
    const float* v = rows::as_float(values.row(j), storage.data(), width);
    for (int64_t i = 0; i < count; ++i) {
      const rows::Vec weight(p[i * step + j - begin]);
      float* out = sum + i * width;
      rows::each_vector(width, [&](int64_t d, int64_t n) {
        rows::store(at::vec::fmadd(weight, rows::load(v + d, n), rows::load(out + d, n)), out + d,
                    n);
      });
    }
  }
}

// -inf at the keys of [begin, end) that a query at `position` does not see; x[0] is that of begin
inline void hide(float* x, const Sequence& s, int64_t position, int64_t begin, int64_t end) {
  for (auto hole = std::lower_bound(s.holes.begin(), s.holes.end(), begin);
       hole != s.holes.end() && *hole < end; ++hole)
    x[*hole - begin] = NONE;
  const int64_t behind = std::max(position + 1, begin);
  if (behind < end) std::fill(x + (behind - begin), x + (end - begin), NONE);
}

// body(r) for the ranks of [begin, end) whose bit is set
template <typename Body>
void each_inhibited(const uint32_t* words, int64_t begin, int64_t end, const Body& body) {
  for (int64_t w = begin / 32; w * 32 < end; ++w) {
    uint32_t word = words[w];
    if (w * 32 < begin) word &= ~0u << (begin - w * 32);
    if (w * 32 + 32 > end) word &= ~0u >> (w * 32 + 32 - end);
    for (; word; word &= word - 1) body(w * 32 + std::countr_zero(word));
  }
}

// One row of the attention: query `query` of head `head`.
struct Row {
  int64_t head, query;
};

// What one call of attention is about; the pointers are those of one sequence.
template <typename scalar_t>
struct Attention {
  const scalar_t* q;  // [H, Lq, d] by strides, unit stride in d
  int64_t q_head, q_step, d;
  scalar_t* out;  // [H, Lq, dv]
  float* lse;     // [H, Lq], or null
  int64_t queries;
  float scale;
  float penalty;  // what is added to an inhibited logit: the logarithm of the suppression
  int64_t words;  // of a row of bits

  // out and lse of `count` rows, all of heads that share keys and values. bits(i): the bits of row
  // i, or null. logits: of each row from key 0 on, `step` apart, to be overwritten; or null, and
  // they are computed.
  template <typename Bits>
  void attend(const Row* row, int64_t count, const Sequence& s, const HeadRows<scalar_t>& keys,
              const HeadRows<scalar_t>& values, const Bits& bits, float* logits,
              int64_t step) const {
    const int64_t dv = values.width;
    int64_t end = 0;
    for (int64_t i = 0; i < count; ++i) end = std::max(end, s.position[row[i].query] + 1);
    std::vector<float> queries, products, storage, sum(count * dv, 0.f), top(count, NONE),
        total(count, 0.f);
    if (!logits) {
      queries = scaled_queries(row, count);
      products.resize(count * KEYS);
    }
    for (int64_t begin = 0; begin < end; begin += KEYS) {
      const int64_t stop = std::min(begin + KEYS, end);
      if (nothing_left(row, count, s, bits, begin, stop)) continue;
      float* x = logits ? logits + begin : products.data();
      const int64_t x_step = logits ? step : KEYS;
      if (!logits) multiply_keys(queries.data(), count, keys, s, begin, stop, x, x_step, storage);
      for (int64_t i = 0; i < count; ++i) {
        float* each = x + i * x_step;
        hide(each, s, s.position[row[i].query], begin, stop);
        inhibit(each, s, bits(i), begin, stop);
        const float factor = weigh(each, stop - begin, top[i], total[i]);
        if (factor != 1) rows::scale(sum.data() + i * dv, factor, sum.data() + i * dv, dv);
      }
      add_values(x, x_step, count, values, s, begin, stop, sum.data(), storage);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* result = sum.data() + i * dv;
      rows::scale(result, total[i] > 0 ? 1 / total[i] : 0.f, result, dv);
      rows::from_float(result, out_row(row[i], dv), dv);
      if (lse) lse[row[i].head * this->queries + row[i].query] = top[i] + std::log(total[i]);
    }
  }

  // scale q, [count, d]
  std::vector<float> scaled_queries(const Row* row, int64_t count) const {
    std::vector<float> result(count * d);
    for (int64_t i = 0; i < count; ++i) {
      float* x = result.data() + i * d;
      rows::to_float(q + row[i].head * q_head + row[i].query * q_step, x, d);
      rows::scale(x, scale, x, d);
    }
    return result;
  }

  scalar_t* out_row(const Row& row, int64_t dv) const {
    return out + (row.head * queries + row.query) * dv;
  }

  // what a query that sees nothing has
  void leave_empty(int64_t heads, int64_t query, int64_t dv) const {
    for (int64_t h = 0; h < heads; ++h) {
      std::fill_n(out_row({h, query}, dv), dv, scalar_t(0));
      if (lse) lse[h * queries + query] = NONE;
    }
  }

 private:
  // the ranks of the image tokens in [begin, stop) that have bits
  std::pair<int64_t, int64_t> ranks(const Sequence& s, int64_t begin, int64_t stop) const {
    return {s.images_until(begin - 1, 32 * words), s.images_until(stop - 1, 32 * words)};
  }

  void inhibit(float* x, const Sequence& s, const uint32_t* bits, int64_t begin,
               int64_t stop) const {
    if (!bits || penalty == 0) return;
    const auto [first, last] = ranks(s, begin, stop);
    each_inhibited(bits, first, last, [&](int64_t r) { x[s.images[r] - begin] += penalty; });
  }

  // whether no row sees any key of [begin, stop), so that keys and values need not be read
  template <typename Bits>
  bool nothing_left(const Row* row, int64_t count, const Sequence& s, const Bits& bits,
                    int64_t begin, int64_t stop) const {
    const int64_t real = s.real_before[stop] - s.real_before[begin];
    if (real == 0) return true;
    const auto [first, last] = ranks(s, begin, stop);
    if (penalty != NONE || real != last - first) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (s.position[row[i].query] < begin) continue;
      int64_t inhibited = 0;
      if (bits(i)) each_inhibited(bits(i), first, last, [&](int64_t) { ++inhibited; });
      if (inhibited < real) return false;
    }
    return true;
  }

  // x = exp(x - top), with top and total brought up to date; what earlier sums are to be scaled by
  static float weigh(float* x, int64_t count, float& top, float& total) {
    const float former = top;
    top = std::max(
        top, at::vec::reduce_all<float>(
                 [](const rows::Vec& a, const rows::Vec& b) { return at::vec::maximum(a, b); }, x,
                 count));
    if (top == NONE) {
      std::fill_n(x, count, 0.f);
      return 1;
    }
    const rows::Vec most(top);
    rows::Vec sum(0.f);
    rows::each_vector(count, [&](int64_t i, int64_t n) {
      const rows::Vec weight = (rows::load(x + i, n) - most).exp();
      rows::store(weight, x + i, n);
      // lanes beyond n hold what they held
      sum = sum + (n == rows::W ? weight : rows::load(x + i, n));
    });
    const float factor = former == NONE ? 0.f : std::exp(former - top);
    total = total * factor + rows::sum_lanes(sum);
    return former == top ? 1.f : factor;
  }
};

}  // namespace vmtc
