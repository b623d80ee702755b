// Which image tokens of one text query are inhibited.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "common.h"

namespace vmtc {

// Exactly one of ratio and threshold; both as SPEC's focus_mask has them.
struct Selection {
  std::optional<double> ratio, threshold;
  int64_t min_keep;

  // bits [words] from the scores of the first `seen` ranks, all that the query sees
  void inhibit(const float* scores, int64_t seen, uint32_t* bits, int64_t words,
               std::vector<float>& storage) const {
    std::fill_n(bits, words, 0u);
    int64_t keep = min_keep;
    if (ratio) keep = std::max(keep, int64_t(std::ceil(*ratio * double(seen))));
    if (keep >= seen) return;
    storage.resize(2 * seen);
    float *ranked = storage.data(), *sorted = ranked + seen;
    for (int64_t r = 0; r < seen; ++r)
      ranked[r] = std::isnan(scores[r]) ? -std::numeric_limits<float>::infinity() : scores[r];
    std::copy_n(ranked, seen, sorted);
    std::nth_element(sorted, sorted + keep - 1, sorted + seen, std::greater<float>());
    const float least = sorted[keep - 1];  // of those that stay
    // as many of those that equal the least as there is room for
    int64_t equals =
        keep - std::count_if(sorted, sorted + keep, [&](float x) { return x > least; });
    const float limit =
        threshold ? float(*threshold) * *std::max_element(sorted, sorted + keep) : 0.f;
    for (int64_t r = 0; r < seen; ++r) {
      if (ranked[r] > least || (ranked[r] == least && equals-- > 0)) continue;
      if (!threshold || ranked[r] < limit) bits[r / 32] |= 1u << (r % 32);
    }
  }
};

inline Selection check_selection(std::optional<double> ratio, std::optional<double> threshold,
                                 int64_t min_keep) {
  TORCH_CHECK_VALUE(ratio.has_value() != threshold.has_value(),
                    "exactly one of keep_ratio and threshold must be given");
  TORCH_CHECK_VALUE(!ratio || (*ratio > 0 && *ratio <= 1), "keep_ratio must be in (0, 1]");
  TORCH_CHECK_VALUE(!threshold || (*threshold >= 0 && *threshold < 1),
                    "threshold must be in [0, 1)");
  check_count(min_keep, "min_keep", 1);
  return {ratio, threshold, min_keep};
}

}  // namespace vmtc
