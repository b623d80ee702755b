// Score, inhibit, attend: one sequence at a time.
#pragma once

#include "inhibit.h"
#include "masked_attention.h"

namespace vmtc {

// keys(g), values(g): the rows of a group
template <typename scalar_t, typename Keys, typename Values>
void focus_sequence(const Attention<scalar_t>& attention, const ScoreOptions& o,
                    const Selection& selection, const Sequence& s, int64_t most, int64_t dv,
                    const std::optional<TextImage>& state, const Keys& keys, const Values& values) {
  const int64_t M = o.matrices(), I = o.num_image, words = attention.words;
  const int64_t share = o.heads / o.groups;
  // without an image token to inhibit it is plain attention
  const bool plain = I == 0 || s.images.empty();
  // text queries: their logits are computed once, for the scores and for the attention
  const auto attend = [&](const int32_t* query, int64_t count, int64_t end, float* logits,
                          const float* scores) {
    std::vector<uint32_t> bits(M * count * words);
    at::parallel_for(0, M * count, grain(8 * I), [&](int64_t first, int64_t last) {
      std::vector<float> storage;
      for (int64_t i = first; i < last; ++i)
        selection.inhibit(scores + i * I, s.images_until(s.position[query[i % count]], I),
                          bits.data() + i * words, words, storage);
    });
    at::parallel_for(0, o.groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        std::vector<Row> row;
        for (int64_t h = g * share; h < (g + 1) * share; ++h)
          for (int64_t i = 0; i < count; ++i) row.push_back({h, query[i]});
        attention.attend(
            row.data(), row.size(), s, keys(g), values(g),
            [&](int64_t i) {
              const int64_t m = o.per_head ? row[i].head : 0;
              return bits.data() + (m * count + i % count) * words;
            },
            logits + g * share * count * end, end);
      }
    });
  };
  if (!plain) {
    score_sequence(attention, o, s, most, keys, state, attend);
  } else if (state) {
    for (int64_t i = 0; i < attention.queries; ++i)
      for (int64_t m = 0; s.is_text(i) && m < M; ++m)
        std::fill_n(state->row(m, s, s.texts_until(s.position[i]) - 1), I, 0.f);
  }
  const auto rest =
      queries_where(s, [&](int64_t i) { return s.is_real(i) && (plain || !s.is_text(i)); });
  attend_queries(attention, s, o.heads, o.groups, rest, keys, values,
                 [](int64_t, int64_t) -> const uint32_t* { return nullptr; });
  for (int64_t i = 0; i < attention.queries; ++i)
    if (!s.is_real(i)) attention.leave_empty(o.heads, i, dv);
}

}  // namespace vmtc
