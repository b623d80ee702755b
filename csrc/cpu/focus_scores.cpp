#include "focus_scores.h"

#include <torch/library.h>

#include "focus_arguments.h"

namespace vmtc {
namespace {

// q: [B, H, Lq, d], k: [B, G, L, d], modality: u8 [B, L], text_image: f32 [B, M, L_max, I]
// -> f32 [B, M, Lq, I]
at::Tensor focus_scores(const at::Tensor& q_in, const at::Tensor& k_in,
                        const at::Tensor& modality_in, int64_t num_image,
                        std::string_view aggregate, std::string_view head_mode, bool renormalize,
                        std::optional<double> scale, const std::optional<at::Tensor>& text_image,
                        const std::optional<at::Tensor>& positions_in) {
  check_attention(q_in, k_in, {}, modality_in);
  const int64_t B = q_in.size(0), queries = q_in.size(2), L = modality_in.size(1);
  const at::Tensor positions = check_positions(positions_in, B, queries);
  const ScoreOptions o =
      check_options(q_in, k_in.size(1), num_image, aggregate, head_mode, renormalize);
  const at::Tensor state = check_text_image(text_image, o, B, queries, L);
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), modality = modality_in.contiguous();

  const int64_t M = o.matrices(), I = num_image;
  at::Tensor scores = at::zeros({B, M, queries, I}, at::kFloat);
  if (scores.numel() == 0) return scores;
  const int64_t most = chunk_size(o, queries, q.size(3), L);
  VMTC_DISPATCH(q.scalar_type(), "focus_scores", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      const Sequence s = make_sequence(modality, positions, b, queries);
      const auto attention = attention_of<scalar_t>(q, b, {}, {}, scale, 0, 0);
      score_sequence(
          attention, o, s, most, [&](int64_t g) { return head_rows<scalar_t>(k, b, g); },
          text_image_of(state, b),
          [&](const int32_t* query, int64_t count, int64_t, float*, const float* of_chunk) {
            float* out = scores.mutable_data_ptr<float>() + b * M * queries * I;
            for (int64_t m = 0; m < M; ++m)
              for (int64_t i = 0; i < count; ++i)
                std::copy_n(of_chunk + (m * count + i) * I, I, out + (m * queries + query[i]) * I);
          });
    });
  });
  if (state.defined() && !state.is_same(*text_image)) text_image->copy_(state);
  return scores;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("focus_scores", focus_scores); }

}  // namespace
}  // namespace vmtc
