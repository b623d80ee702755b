#include <torch/library.h>

#include "rows.h"

namespace vmtc {
namespace {

// x: [B, gh*gw, D] -> [B, ceil(gh/f)*ceil(gw/f), D]
at::Tensor spatial_downsample(const at::Tensor& x_in, at::IntArrayRef grid, int64_t factor) {
  check_tokens(x_in, "x");
  check_count(factor, "factor", 1);
  // by division, as the product may not fit
  TORCH_CHECK_VALUE(grid.size() == 2 && grid[0] > 0 && grid[1] > 0 && x_in.size(1) > 0 &&
                        x_in.size(1) % grid[0] == 0 && x_in.size(1) / grid[0] == grid[1],
                    "grid must hold the ", x_in.size(1), " tokens of x, got ", grid);
  const at::Tensor x = unit_rows(x_in);
  const int64_t B = x.size(0), D = x.size(2), gh = grid[0], gw = grid[1];
  const int64_t rows_out = (gh - 1) / factor + 1, columns_out = (gw - 1) / factor + 1;
  at::Tensor out = at::empty({B, rows_out * columns_out, D}, x.options());

  VMTC_DISPATCH(x.scalar_type(), "spatial_downsample", [&] {
    const int64_t cells = rows_out * columns_out;
    at::parallel_for(
        0, B * cells, grain(B * gh * gw * D / std::max<int64_t>(B * cells, 1)),
        [&](int64_t begin, int64_t end) {
          // the mean, and the four rows that weighted_sum reads together
          std::vector<float> buffer(5 * D);
          for (int64_t cell = begin; cell < end; ++cell) {
            const int64_t b = cell / cells, u = cell % cells / columns_out, v = cell % columns_out;
            const int64_t top = u * factor, height = std::min(factor, gh - top);
            const int64_t left = v * factor, width = std::min(factor, gw - left);
            const float share = 1.f / (height * width);
            rows::weighted_sum(
                height * width,
                [&](int64_t i) {
                  const int64_t position = (top + i / width) * gw + left + i % width;
                  return rows::as_float(
                      x.const_data_ptr<scalar_t>() + b * x.stride(0) + position * x.stride(1),
                      buffer.data() + (1 + i % 4) * D, D);
                },
                [&](int64_t) { return share; }, buffer.data(), D);
            rows::from_float(buffer.data(), out.mutable_data_ptr<scalar_t>() + cell * D, D);
          }
        });
  });
  return out;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("spatial_downsample", spatial_downsample); }

}  // namespace
}  // namespace vmtc
