// Attention of all queries of one sequence that are of one kind.
#pragma once

#include "focus_arguments.h"

namespace vmtc {

// queries of one head at a time
constexpr int64_t QUERIES = 64;

// Attention of these queries, ascending by position. keys(g), values(g): the rows of a group;
// bits(h, i): the bits of a query, or null.
template <typename scalar_t, typename Keys, typename Values, typename Bits>
void attend_queries(const Attention<scalar_t>& attention, const Sequence& s, int64_t heads,
                    int64_t groups, const std::vector<int32_t>& queries, const Keys& keys,
                    const Values& values, const Bits& bits) {
  const int64_t share = heads / groups, count = queries.size();
  // few queries go with those of all heads that share their keys, which are then read once
  const int64_t joint = count * share <= QUERIES ? share : 1;
  const int64_t blocks = (count + QUERIES - 1) / QUERIES;
  at::parallel_for(0, heads / joint * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / blocks * joint, begin = task % blocks * QUERIES;
      std::vector<Row> row;
      for (int64_t h = head; h < head + joint; ++h)
        for (int64_t i = begin; i < std::min(begin + QUERIES, count); ++i)
          row.push_back({h, queries[i]});
      attention.attend(
          row.data(), row.size(), s, keys(head / share), values(head / share),
          [&](int64_t i) { return bits(row[i].head, row[i].query); }, nullptr, 0);
    }
  });
}

}  // namespace vmtc
