// Who is who in one row of a batch: keys by modality, queries by position.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "common.h"

namespace vmtc {

enum Kind : uint8_t { padding = 0, text = 1, image = 2 };

struct Sequence {
  std::vector<uint8_t> kind;           // [L], anything unknown is padding
  std::vector<int32_t> texts, images;  // positions, ascending; the place of an image is its rank
  std::vector<int32_t> holes;          // positions of padding
  std::vector<int32_t> real_before;    // [L + 1], keys below a position that are not padding
  std::vector<int64_t> position;       // [Lq], outside of 0..L-1 if the query is padding

  int64_t length() const { return kind.size(); }
  bool is_real(int64_t query) const { return position[query] >= 0; }
  bool is_text(int64_t query) const { return is_real(query) && kind[position[query]] == text; }

  // image tokens at or before a position, of the first `limit` of them
  int64_t images_until(int64_t at, int64_t limit) const {
    const auto end = images.begin() + std::min<int64_t>(limit, images.size());
    return std::upper_bound(images.begin(), end, at) - images.begin();
  }
  int64_t texts_until(int64_t at) const {
    return std::upper_bound(texts.begin(), texts.end(), at) - texts.begin();
  }
};

// queries that fulfil `wanted`, by ascending position
template <typename Wanted>
std::vector<int32_t> queries_where(const Sequence& sequence, const Wanted& wanted) {
  std::vector<int32_t> found;
  for (size_t i = 0; i < sequence.position.size(); ++i)
    if (wanted(i)) found.push_back(i);
  std::stable_sort(found.begin(), found.end(), [&](int32_t a, int32_t b) {
    return sequence.position[a] < sequence.position[b];
  });
  return found;
}

// modality: u8 [B, L], contiguous; positions: i32 [B, Lq], contiguous, or undefined: then the
// queries are the last before `end`. Keys of which exists(j) is false are padding.
template <typename Exists>
Sequence make_sequence(const at::Tensor& modality, const at::Tensor& positions, int64_t b,
                       int64_t queries, int64_t end, const Exists& exists) {
  const int64_t L = modality.size(1);
  const uint8_t* given = modality.const_data_ptr<uint8_t>() + b * L;
  Sequence s;
  s.kind.resize(L);
  s.real_before.resize(L + 1);
  for (int64_t j = 0; j < L; ++j) {
    const bool known = (given[j] == text || given[j] == image) && exists(j);
    s.kind[j] = known ? given[j] : uint8_t(padding);
    (s.kind[j] == text ? s.texts : s.kind[j] == image ? s.images : s.holes).push_back(j);
    s.real_before[j + 1] = s.real_before[j] + known;
  }
  s.position.resize(queries);
  const int32_t* at = positions.defined() ? positions.const_data_ptr<int32_t>() : nullptr;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t p = at ? at[b * queries + i] : end - queries + i;
    s.position[i] = p >= 0 && p < L && s.kind[p] != padding ? p : -1;
  }
  return s;
}

inline Sequence make_sequence(const at::Tensor& modality, const at::Tensor& positions, int64_t b,
                              int64_t queries) {
  return make_sequence(modality, positions, b, queries, modality.size(1),
                       [](int64_t) { return true; });
}

}  // namespace vmtc
