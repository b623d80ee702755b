#include <torch/library.h>

#include "select.h"

namespace vmtc {
namespace {

// the finaliser of MurmurHash3, as in select_random.py
uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

std::tuple<at::Tensor, at::Tensor> select_random(const at::Tensor& x, int64_t num_tokens,
                                                 int64_t seed,
                                                 const std::optional<at::Tensor>& valid) {
  const uint32_t start = mix(static_cast<uint32_t>(seed));
  return select_tokens(x, num_tokens, valid, [&](std::vector<int32_t> chosen) {
    const int64_t kept = std::min<int64_t>(num_tokens, chosen.size());
    // mix is a bijection, so no two positions tie
    std::nth_element(chosen.begin(), chosen.begin() + kept, chosen.end(),
                     [&](int32_t i, int32_t j) { return mix(i + start) < mix(j + start); });
    chosen.resize(kept);
    std::sort(chosen.begin(), chosen.end());
    return chosen;
  });
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("select_random", select_random); }

}  // namespace
}  // namespace vmtc
