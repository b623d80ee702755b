// Gathering of selected tokens: shared by the selecting baselines.
#pragma once

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common.h"

namespace vmtc {

// choose(valid positions) -> positions to keep, ascending, at most M.
// x: [B, N, D] -> tokens [B, M, D], positions i32 [B, M]
template <typename Choose>
std::tuple<at::Tensor, at::Tensor> select_tokens(const at::Tensor& x_in, int64_t M,
                                                 const std::optional<at::Tensor>& valid_in,
                                                 const Choose& choose) {
  check_tokens(x_in, "x");
  check_count(M, "num_tokens", 1);
  const at::Tensor valid = check_valid(valid_in, x_in);
  const at::Tensor x = unit_rows(x_in);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2);
  at::Tensor tokens = at::empty({B, M, D}, x.options());
  at::Tensor positions = at::empty({B, M}, x.options().dtype(at::kInt));

  const int64_t width = x.element_size();
  at::parallel_for(0, B, grain(M * D), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const std::vector<int32_t> kept = choose(valid_positions(valid, b, N));
      const int64_t count = kept.size();
      int32_t* position = positions.mutable_data_ptr<int32_t>() + b * M;
      std::copy_n(kept.data(), count, position);
      std::fill_n(position + count, M - count, -1);
      const char* source = static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * width;
      char* out = static_cast<char*>(tokens.mutable_data_ptr()) + b * M * D * width;
      for (int64_t m = 0; m < count; ++m)
        std::memcpy(out + m * D * width, source + kept[m] * x.stride(1) * width, D * width);
      std::memset(out + count * D * width, 0, (M - count) * D * width);
    }
  });
  return {tokens, positions};
}

}  // namespace vmtc
