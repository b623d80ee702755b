#include <torch/library.h>

#include "inhibit.h"
#include "masked_attention.h"

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
  const int64_t B = q_in.size(0), H = q_in.size(1), queries = q_in.size(2);
  const int64_t L = modality_in.size(1), G = k_in.size(1), dv = v_in.size(3);
  const at::Tensor positions = check_positions(positions_in, B, queries);
  const ScoreOptions o = check_options(q_in, G, num_image, aggregate, head_mode, renormalize);
  const at::Tensor state = check_text_image(text_image, o, B, queries, L);
  const Selection selection = check_selection(keep_ratio, threshold, min_keep);
  TORCH_CHECK_VALUE(suppression >= 0 && suppression <= 1, "suppression must be in [0, 1], got ",
                    suppression);
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const at::Tensor modality = modality_in.contiguous();

  const int64_t M = o.matrices(), words = (num_image + 31) / 32, share = H / G;
  const int64_t most = chunk_size(o, queries, q.size(3), L);
  at::Tensor out = at::empty({B, H, queries, dv}, q.options());
  VMTC_DISPATCH(q.scalar_type(), "focus_attention", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      const Sequence s = make_sequence(modality, positions, b, queries, L);
      const auto attention = attention_of<scalar_t>(q, b, out, {}, scale, suppression, words);
      const auto keys = [&](int64_t g) { return head_rows<scalar_t>(k, b, g); };
      const auto values = [&](int64_t g) { return head_rows<scalar_t>(v, b, g); };
      // without an image token to inhibit it is plain attention
      const bool plain = num_image == 0 || s.images.empty();
      // text queries: their logits are computed once, for the scores and for the attention
      const auto attend = [&](const int32_t* query, int64_t count, int64_t end, float* logits,
                              const float* scores) {
        std::vector<uint32_t> bits(M * count * words);
        at::parallel_for(0, M * count, grain(8 * num_image), [&](int64_t first, int64_t last) {
          std::vector<float> storage;
          for (int64_t i = first; i < last; ++i)
            selection.inhibit(scores + i * num_image,
                              s.images_until(s.position[query[i % count]], num_image),
                              bits.data() + i * words, words, storage);
        });
        at::parallel_for(0, G, 1, [&](int64_t first, int64_t last) {
          for (int64_t g = first; g < last; ++g) {
            std::vector<Row> row;
            for (int64_t h = g * share; h < (g + 1) * share; ++h)
              for (int64_t i = 0; i < count; ++i) row.push_back({h, query[i]});
            attention.attend(
                row.data(), row.size(), s, keys(g), values(g),
                [&](int64_t i) {
                  const int64_t m = M == 1 ? 0 : row[i].head;
                  return bits.data() + (m * count + i % count) * words;
                },
                logits + g * share * count * end, end);
          }
        });
      };
      if (!plain) score_sequence(attention, o, s, most, keys, text_image_of(state, b), attend);
      attend_queries(
          attention, s, H, G,
          queries_where(s, [&](int64_t i) { return s.is_real(i) && (plain || !s.is_text(i)); }),
          keys, values, [](int64_t, int64_t) -> const uint32_t* { return nullptr; });
      for (int64_t i = 0; i < queries; ++i)
        if (!s.is_real(i)) attention.leave_empty(H, i, dv);
      if (plain && state.defined())
        for (int64_t i = 0; i < queries; ++i)
          if (s.is_text(i))
            for (int64_t m = 0; m < M; ++m)
              std::fill_n(state.mutable_data_ptr<float>() + b * state.stride(0) +
                              m * state.stride(1) + s.position[i] * state.stride(2),
                          num_image, 0.f);
    });
  });
  if (state.defined() && !state.is_same(*text_image)) text_image->copy_(state);
  return out;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("focus_attention", focus_attention); }

}  // namespace
}  // namespace vmtc
