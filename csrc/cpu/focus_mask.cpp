#include <torch/library.h>

#include "focus_arguments.h"
#include "inhibit.h"
#include "rows.h"

namespace vmtc {
namespace {

// scores: [B, M, Lq, I], modality: u8 [B, L] -> i32 [B, M, Lq, ceil(I / 32)]
at::Tensor focus_mask(const at::Tensor& scores_in, const at::Tensor& modality_in,
                      std::optional<double> keep_ratio, std::optional<double> threshold,
                      int64_t min_keep, const std::optional<at::Tensor>& positions_in) {
  check_cpu_rows(scores_in, "scores", 4);
  const int64_t B = scores_in.size(0), M = scores_in.size(1), queries = scores_in.size(2);
  const int64_t I = scores_in.size(3), words = (I + 31) / 32;
  TORCH_CHECK_VALUE(modality_in.device().is_cpu() && modality_in.scalar_type() == at::kByte &&
                        modality_in.dim() == 2 && modality_in.size(0) == B &&
                        modality_in.size(1) >= queries,
                    "modality must be uint8 [B, L] with L >= Lq, got ", modality_in.sizes());
  const at::Tensor positions = check_positions(positions_in, B, queries);
  const Selection selection = check_selection(keep_ratio, threshold, min_keep);
  const at::Tensor scores = unit_rows(scores_in), modality = modality_in.contiguous();

  at::Tensor mask = at::empty({B, M, queries, words}, at::kInt);
  if (mask.numel() == 0) return mask;
  VMTC_DISPATCH(scores.scalar_type(), "focus_mask", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      const Sequence s = make_sequence(modality, positions, b, queries);
      const scalar_t* given = scores.const_data_ptr<scalar_t>() + b * scores.stride(0);
      auto* bits =
          reinterpret_cast<uint32_t*>(mask.mutable_data_ptr<int32_t>()) + b * M * queries * words;
      at::parallel_for(0, M * queries, grain(8 * I), [&](int64_t first, int64_t last) {
        std::vector<float> row, storage;
        for (int64_t task = first; task < last; ++task) {
          const int64_t m = task / queries, i = task % queries;
          const int64_t seen = s.is_text(i) ? s.images_until(s.position[i], I) : 0;
          row.resize(seen);
          rows::to_float(given + m * scores.stride(1) + i * scores.stride(2), row.data(), seen);
          selection.inhibit(row.data(), seen, bits + task * words, words, storage);
        }
      });
    });
  });
  return mask;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("focus_mask", focus_mask); }

}  // namespace
}  // namespace vmtc
