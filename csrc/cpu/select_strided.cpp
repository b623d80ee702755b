#include <torch/library.h>

#include "select.h"

namespace vmtc {
namespace {

std::tuple<at::Tensor, at::Tensor> select_strided(const at::Tensor& x, int64_t num_tokens,
                                                  const std::optional<at::Tensor>& valid) {
  return select_tokens(x, num_tokens, valid, [&](const std::vector<int32_t>& positions) {
    const int64_t R = positions.size(), kept = std::min(num_tokens, R);
    std::vector<int32_t> chosen(kept);
    for (int64_t m = 0; m < kept; ++m) chosen[m] = positions[(2 * m + 1) * R / (2 * kept)];
    return chosen;
  });
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("select_strided", select_strided); }

}  // namespace
}  // namespace vmtc
