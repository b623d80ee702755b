#include "focus_attention.h"

#include <torch/library.h>

namespace vmtc {
namespace {

// q: [B, H, Lq, d], k: [B, G, L, d], v: [B, G, L, dv], modality: u8 [B, L],
// text_image: f32 [B, M, L_max, I] -> [B, H, Lq, dv]
at::Tensor focus_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           const at::Tensor& modality_in, int64_t num_image,
                           std::optional<double> keep_ratio, std::optional<double> threshold,
                           std::string_view aggregate, std::string_view head_mode, bool renormalize,
                           int64_t min_keep, double suppression, std::optional<double> scale,
                           const std::optional<at::Tensor>& text_image,
                           const std::optional<at::Tensor>& positions_in) {
  check_attention(q_in, k_in, v_in, modality_in);
  const int64_t B = q_in.size(0), queries = q_in.size(2), L = modality_in.size(1);
  const at::Tensor positions = check_positions(positions_in, B, queries);
  const ScoreOptions o =
      check_options(q_in, k_in.size(1), num_image, aggregate, head_mode, renormalize);
  const at::Tensor state = check_text_image(text_image, o, B, queries, L);
  const Selection selection = check_selection(keep_ratio, threshold, min_keep);
  check_suppression(suppression);
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const at::Tensor modality = modality_in.contiguous();

  const int64_t dv = v.size(3), most = chunk_size(o, queries, q.size(3), L);
  at::Tensor out = at::empty({B, o.heads, queries, dv}, q.options());
  VMTC_DISPATCH(q.scalar_type(), "focus_attention", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      focus_sequence(
          attention_of<scalar_t>(q, b, out, {}, scale, suppression, (num_image + 31) / 32), o,
          selection, make_sequence(modality, positions, b, queries), most, dv,
          text_image_of(state, b), [&](int64_t g) { return head_rows<scalar_t>(k, b, g); },
          [&](int64_t g) { return head_rows<scalar_t>(v, b, g); });
    });
  });
  if (state.defined() && !state.is_same(*text_image)) text_image->copy_(state);
  return out;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("focus_attention", focus_attention); }

}  // namespace
}  // namespace vmtc
