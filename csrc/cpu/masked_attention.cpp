#include "masked_attention.h"

#include <torch/library.h>

namespace vmtc {
namespace {

// q: [B, H, Lq, d], k: [B, G, L, d], v: [B, G, L, dv], modality: u8 [B, L], mask: i32 [B, M, Lq, W]
// -> [B, H, Lq, dv], f32 [B, H, Lq]
std::tuple<at::Tensor, at::Tensor> masked_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const at::Tensor& v_in,
                                                    const at::Tensor& modality_in,
                                                    const at::Tensor& mask_in, double suppression,
                                                    std::optional<double> scale,
                                                    const std::optional<at::Tensor>& positions_in) {
  check_attention(q_in, k_in, v_in, modality_in);
  const int64_t B = q_in.size(0), H = q_in.size(1), queries = q_in.size(2);
  const at::Tensor positions = check_positions(positions_in, B, queries);
  TORCH_CHECK_TYPE(mask_in.scalar_type() == at::kInt, "mask must be int32, got ",
                   mask_in.scalar_type());
  TORCH_CHECK_VALUE(mask_in.device().is_cpu() && mask_in.dim() == 4 && mask_in.size(0) == B &&
                        (mask_in.size(1) == 1 || mask_in.size(1) == H) &&
                        mask_in.size(2) == queries,
                    "mask must be [B, 1 or H, Lq, W], got ", mask_in.sizes());
  check_suppression(suppression);
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const at::Tensor modality = modality_in.contiguous(), mask = mask_in.contiguous();

  const int64_t G = k.size(1), dv = v.size(3), M = mask.size(1), words = mask.size(3);
  at::Tensor out = at::empty({B, H, queries, dv}, q.options());
  at::Tensor lse = at::empty({B, H, queries}, at::kFloat);
  VMTC_DISPATCH(q.scalar_type(), "masked_attention", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      const Sequence s = make_sequence(modality, positions, b, queries);
      const auto attention = attention_of<scalar_t>(q, b, out, lse, scale, suppression, words);
      const auto* bits = reinterpret_cast<const uint32_t*>(mask.const_data_ptr<int32_t>()) +
                         b * M * queries * words;
      attend_queries(
          attention, s, H, G, queries_where(s, [&](int64_t i) { return s.is_real(i); }),
          [&](int64_t g) { return head_rows<scalar_t>(k, b, g); },
          [&](int64_t g) { return head_rows<scalar_t>(v, b, g); },
          [&](int64_t h, int64_t i) { return bits + ((M == 1 ? 0 : h) * queries + i) * words; });
      for (int64_t i = 0; i < queries; ++i)
        if (!s.is_real(i)) attention.leave_empty(H, i, dv);
    });
  });
  return {out, lse};
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("masked_attention", masked_attention); }

}  // namespace
}  // namespace vmtc
