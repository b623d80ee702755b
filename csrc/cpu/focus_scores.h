// Focus scores of a chunk of text queries of one sequence, and the logits that they came from.
#pragma once

#include <ATen/ops/zeros.h>

#include "attend.h"

namespace vmtc {

// the rows of text_image: of one sequence, float32 with unit stride in I, a row for each position
// or, where the caller has no state, for each text token
struct TextImage {
  float* base;
  int64_t head_step, row_step;
  bool by_position;

  float* row(int64_t head, const Sequence& s, int64_t text_rank) const {
    const int64_t place = by_position ? s.texts[text_rank] : text_rank;
    return base + head * head_step + place * row_step;
  }
};

struct ScoreOptions {
  bool per_head, residual, renormalize;
  int64_t heads, groups, num_image;
  int64_t matrices() const { return per_head ? heads : 1; }
};

// keys that one thread averages at a time
constexpr int64_t COLUMNS = 512;

// logits [H, count, step] of the queries to every key before `end`, -inf where they do not see it,
// and for each query the largest and 1 / sum of exp(logit - largest) [H, count]. Their logarithm as
// one number would be rounded to what float32 tells apart at the largest. keys(g): of a group.
template <typename scalar_t, typename Keys>
void text_logits(const Attention<scalar_t>& attention, const ScoreOptions& o, const Sequence& s,
                 const int32_t* queries, int64_t count, int64_t end, const Keys& keys,
                 float* logits, int64_t step, float* largest, float* inverse) {
  const int64_t share = o.heads / o.groups;
  at::parallel_for(0, o.groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> storage;
    for (int64_t g = first; g < last; ++g) {
      std::vector<Row> row;
      for (int64_t h = g * share; h < (g + 1) * share; ++h)
        for (int64_t i = 0; i < count; ++i) row.push_back({h, queries[i]});
      const std::vector<float> q = attention.scaled_queries(row.data(), row.size());
      float* x = logits + g * share * count * step;
      // in blocks, so that the keys that stay in the cache do not depend on how many there are
      for (int64_t begin = 0; begin < end; begin += KEYS)
        multiply_keys(q.data(), row.size(), keys(g), s, begin, std::min(begin + KEYS, end),
                      x + begin, step, storage);
      for (size_t i = 0; i < row.size(); ++i) {
        float* each = x + i * step;
        hide(each, s, s.position[row[i].query], 0, end);
        const float top = at::vec::reduce_all<float>(
            [](const rows::Vec& a, const rows::Vec& b) { return at::vec::maximum(a, b); }, each,
            end);
        float total = 0;
        for (int64_t begin = 0; begin < end; begin += COLUMNS)
          total += rows::reduce(
              std::min(COLUMNS, end - begin), [&](const rows::Vec& sum, int64_t j, int64_t n) {
                // a lane beyond n holds 0 and must add nothing
                const rows::Vec weight = (rows::load(each + begin + j, n) - rows::Vec(top)).exp();
                return sum + (n == rows::W ? weight : rows::Vec::set(rows::Vec(0.f), weight, n));
              });
        largest[g * share * count + i] = top;
        inverse[g * share * count + i] = 1 / total;
      }
    }
  });
}

// Attention to text, compact by rank [M, count, T], and to images, into the rows of text_image of
// the queries themselves.
inline void average(const ScoreOptions& o, const Sequence& s, const int32_t* queries, int64_t count,
                    int64_t end, const float* logits, int64_t step, const float* largest,
                    const float* inverse, float* to_text, int64_t T, const TextImage& state) {
  const int64_t pieces = (end + COLUMNS - 1) / COLUMNS, summed = o.heads / o.matrices();
  at::parallel_for(
      0, o.matrices() * count * pieces, grain(summed * COLUMNS), [&](int64_t first, int64_t last) {
        float mean[COLUMNS];
        for (int64_t task = first; task < last; ++task) {
          const int64_t m = task / (count * pieces), i = task / pieces % count;
          const int64_t begin = task % pieces * COLUMNS, n_keys = std::min(COLUMNS, end - begin);
          std::fill_n(mean, n_keys, 0.f);
          for (int64_t h = m * summed; h < (m + 1) * summed; ++h) {
            const float* x = logits + (h * count + i) * step + begin;
            const rows::Vec top(largest[h * count + i]), part(inverse[h * count + i]);
            rows::each_vector(n_keys, [&](int64_t j, int64_t n) {
              rows::store(
                  at::vec::fmadd((rows::load(x + j, n) - top).exp(), part, rows::load(mean + j, n)),
                  mean + j, n);
            });
          }
          rows::scale(mean, 1.f / summed, mean, n_keys);
          const int64_t own = s.texts_until(s.position[queries[i]]) - 1;
          float* text_row = to_text + (m * count + i) * T;
          for (int64_t t = s.texts_until(begin - 1); t < T && s.texts[t] < begin + n_keys; ++t)
            text_row[t] = mean[s.texts[t] - begin];
          float* image_row = state.row(m, s, own);
          const int64_t r_end = s.images_until(begin + n_keys - 1, o.num_image);
          for (int64_t r = s.images_until(begin - 1, o.num_image); r < r_end; ++r)
            image_row[r] = mean[s.images[r] - begin];
          // image tokens behind the last query of the chunk
          if (begin + n_keys == end) std::fill(image_row + r_end, image_row + o.num_image, 0.f);
        }
      });
}

// scores [M, count, I] from to_text [M, count, T], whose rows are renormalised in place
inline void aggregate(const ScoreOptions& o, const Sequence& s, const int32_t* queries,
                      int64_t count, float* to_text, int64_t T, const TextImage& state,
                      float* scores) {
  const int64_t I = o.num_image, pieces = (I + COLUMNS - 1) / COLUMNS;
  if (o.renormalize)
    for (int64_t i = 0; i < o.matrices() * count; ++i) {
      float* row = to_text + i * T;
      const float total = rows::reduce(T, [&](const rows::Vec& sum, int64_t t, int64_t n) {
        return sum + rows::load(row + t, n);
      });
      if (total > 0) rows::scale(row, 1 / total, row, T);
    }
  // text tokens at a time
  constexpr int64_t TEXTS = 128;
  at::parallel_for(0, o.matrices() * pieces, 1, [&](int64_t first, int64_t last) {
    std::vector<float> gathered, sum;
    for (int64_t task = first; task < last; ++task) {
      const int64_t m = task / pieces, begin = task % pieces * COLUMNS;
      const int64_t width = std::min(COLUMNS, I - begin);
      const float* weights = to_text + m * count * T;
      sum.assign(count * width, 0.f);
      for (int64_t t = 0; t < T; t += TEXTS) {
        const int64_t n = std::min(TEXTS, T - t);
        const auto source = [&](int64_t j) { return state.row(m, s, t + j) + begin; };
        if (count >= FEW) {
          gathered.resize(n * width);
          for (int64_t j = 0; j < n; ++j)
            std::copy_n(source(j), width, gathered.data() + j * width);
          at::Tensor c = matrix(sum.data(), count, width, width);
          at::addmm_out(c, c, matrix(weights + t, count, n, T),
                        matrix(gathered.data(), n, width, width));
        } else {
          gathered.resize(width);
          for (int64_t i = 0; i < count; ++i) {
            rows::weighted_sum(
                n, source, [&](int64_t j) { return weights[i * T + t + j]; }, gathered.data(),
                width);
            float* out = sum.data() + i * width;
            rows::each_vector(width, [&](int64_t r, int64_t k) {
              rows::store(rows::load(out + r, k) + rows::load(gathered.data() + r, k), out + r, k);
            });
          }
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        float* out = scores + (m * count + i) * I + begin;
        std::copy_n(sum.data() + i * width, width, out);
        if (!o.residual) continue;
        const int64_t own = s.texts_until(s.position[queries[i]]) - 1;
        const float* direct = state.row(m, s, own) + begin;
        for (int64_t r = 0; r < width; ++r) out[r] += direct[r];
      }
    }
  });
}

// How many text queries of Lq are scored at a time: their logits take as much memory as half of the
// queries, or a few megabytes.
inline int64_t chunk_size(const ScoreOptions& o, int64_t queries, int64_t d, int64_t L) {
  const int64_t bytes = std::max<int64_t>(4 << 20, o.heads * queries * d * sizeof(float) / 2);
  const int64_t most = std::max<int64_t>(1, bytes / int64_t(sizeof(float)) / (o.heads * L));
  return std::min(most, std::max<int64_t>(1, queries));
}

// Scores of all text queries of a sequence, `most` at a time:
// then(queries, count, end, logits [H, count, end], scores [M, count, I])
template <typename scalar_t, typename Keys, typename Then>
void score_sequence(const Attention<scalar_t>& attention, const ScoreOptions& o, const Sequence& s,
                    int64_t most, const Keys& keys, const std::optional<TextImage>& given,
                    const Then& then) {
  const std::vector<int32_t> texts = queries_where(s, [&](int64_t i) { return s.is_text(i); });
  if (texts.empty()) return;
  const int64_t all = texts.size(), M = o.matrices();
  const int64_t last = s.position[texts.back()] + 1, T = s.texts_until(last - 1);
  most = (all + (all + most - 1) / most - 1) / ((all + most - 1) / most);  // of equal size
  at::Tensor logits = at::empty({o.heads * most * last}, at::kFloat);
  at::Tensor sums = at::empty({2, o.heads * most}, at::kFloat);
  at::Tensor to_text = at::empty({M * most * T}, at::kFloat);
  at::Tensor scores = at::empty({M * most * o.num_image}, at::kFloat);
  at::Tensor own;
  TextImage state;
  if (given) {
    state = *given;
  } else {
    own = at::zeros({M * T * o.num_image}, at::kFloat);
    state = {own.mutable_data_ptr<float>(), T * o.num_image, o.num_image, false};
  }
  for (int64_t begin = 0; begin < all; begin += most) {
    const int32_t* queries = texts.data() + begin;
    const int64_t count = std::min(most, all - begin);
    const int64_t end = s.position[queries[count - 1]] + 1, seen = s.texts_until(end - 1);
    float* x = logits.mutable_data_ptr<float>();
    float *largest = sums.mutable_data_ptr<float>(), *inverse = largest + o.heads * most;
    text_logits(attention, o, s, queries, count, end, keys, x, end, largest, inverse);
    float* text_rows = to_text.mutable_data_ptr<float>();
    average(o, s, queries, count, end, x, end, largest, inverse, text_rows, seen, state);
    aggregate(o, s, queries, count, text_rows, seen, state, scores.mutable_data_ptr<float>());
    then(queries, count, end, x, scores.const_data_ptr<float>());
  }
}

}  // namespace vmtc
