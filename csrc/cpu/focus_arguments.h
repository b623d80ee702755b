// Checks and views that the operators of focus attention share.
#pragma once

#include "attend.h"
#include "focus_scores.h"

namespace vmtc {

// q: [B, H, Lq, d], modality: u8 [B, L]
inline void check_queries(const at::Tensor& q, const at::Tensor& modality) {
  check_cpu_rows(q, "q", 4);
  TORCH_CHECK_VALUE(q.size(1) > 0 && q.size(3) > 0, "q must have heads and features, got ",
                    q.sizes());
  TORCH_CHECK_TYPE(modality.scalar_type() == at::kByte, "modality must be uint8, got ",
                   modality.scalar_type());
  TORCH_CHECK_VALUE(
      modality.device().is_cpu() && modality.dim() == 2 && modality.size(0) == q.size(0),
      "modality must be [B, L], got ", modality.sizes());
  TORCH_CHECK_VALUE(
      modality.size(1) <= std::numeric_limits<int32_t>::max() && q.size(2) <= modality.size(1),
      "modality must have at least Lq and fewer than 2^31 positions, got ", modality.sizes());
}

inline void check_groups(const at::Tensor& q, const at::Tensor& k, int64_t groups) {
  TORCH_CHECK_VALUE(groups > 0 && q.size(1) % groups == 0,
                    "k must have heads that divide those of q, got ", k.sizes());
}

// q: [B, H, Lq, d], k: [B, G, L, d], v: [B, G, L, dv] or undefined
inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& modality) {
  check_queries(q, modality);
  check_cpu_rows(k, "k", 4);
  check_groups(q, k, k.size(1));
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type(), "k must have the dtype of q");
  TORCH_CHECK_VALUE(
      k.sizes() == at::IntArrayRef({q.size(0), k.size(1), modality.size(1), q.size(3)}),
      "k must be [B, G, L, d], got ", k.sizes());
  if (!v.defined()) return;
  check_cpu_rows(v, "v", 4);
  TORCH_CHECK_TYPE(v.scalar_type() == q.scalar_type(), "v must have the dtype of q");
  TORCH_CHECK_VALUE(v.sizes().slice(0, 3) == k.sizes().slice(0, 3) && v.size(3) > 0,
                    "v must be [B, G, L, dv], got ", v.sizes());
}

inline void check_suppression(double suppression) {
  TORCH_CHECK_VALUE(suppression >= 0 && suppression <= 1, "suppression must be in [0, 1], got ",
                    suppression);
}

// contiguous i32 [B, Lq], undefined where absent
inline at::Tensor check_positions(const std::optional<at::Tensor>& positions, int64_t B,
                                  int64_t queries) {
  if (!positions.has_value()) return {};
  TORCH_CHECK_TYPE(positions->scalar_type() == at::kInt, "query_positions must be int32, got ",
                   positions->scalar_type());
  TORCH_CHECK_VALUE(
      positions->device().is_cpu() && positions->sizes() == at::IntArrayRef({B, queries}),
      "query_positions must be [B, Lq], got ", positions->sizes());
  return positions->contiguous();
}

inline ScoreOptions check_options(const at::Tensor& q, int64_t groups, int64_t num_image,
                                  std::string_view aggregate, std::string_view head_mode,
                                  bool renormalize) {
  check_count(num_image, "num_image", 0);
  TORCH_CHECK_VALUE(num_image <= std::numeric_limits<int32_t>::max(),
                    "num_image must be below 2^31, got ", num_image);
  TORCH_CHECK_VALUE(aggregate == "product" || aggregate == "residual",
                    "aggregate must be one of ['product', 'residual'], got '", aggregate, "'");
  TORCH_CHECK_VALUE(head_mode == "mean" || head_mode == "per_head",
                    "head_mode must be one of ['mean', 'per_head'], got '", head_mode, "'");
  return {
      head_mode == "per_head", aggregate == "residual", renormalize, q.size(1), groups, num_image};
}

// the caller's state, or a copy of it with unit stride in I that must be copied back
inline at::Tensor check_text_image(const std::optional<at::Tensor>& given, const ScoreOptions& o,
                                   int64_t B, int64_t queries, int64_t L) {
  TORCH_CHECK_VALUE(given.has_value() || queries == L,
                    "text_image must be given where there are fewer queries than positions");
  if (!given.has_value()) return {};
  TORCH_CHECK_TYPE(given->scalar_type() == at::kFloat, "text_image must be float32, got ",
                   given->scalar_type());
  TORCH_CHECK_VALUE(given->device().is_cpu() && given->dim() == 4 && given->size(0) == B &&
                        given->size(1) == o.matrices() && given->size(2) >= L &&
                        given->size(3) == o.num_image,
                    "text_image must be [B, M, L_max, I], got ", given->sizes());
  return unit_rows(*given);
}

inline std::optional<TextImage> text_image_of(const at::Tensor& state, int64_t b) {
  if (!state.defined()) return std::nullopt;
  return TextImage{state.mutable_data_ptr<float>() + b * state.stride(0), state.stride(1),
                   state.stride(2), true};
}

// what is the same for every row of a sequence
template <typename scalar_t>
Attention<scalar_t> attention_of(const at::Tensor& q, int64_t b, const at::Tensor& out,
                                 const at::Tensor& lse, std::optional<double> scale,
                                 double suppression, int64_t words) {
  const int64_t H = q.size(1), queries = q.size(2), d = q.size(3);
  Attention<scalar_t> a{};
  a.q = q.const_data_ptr<scalar_t>() + b * q.stride(0);
  a.q_head = q.stride(1), a.q_step = q.stride(2), a.d = d;
  if (out.defined()) a.out = out.mutable_data_ptr<scalar_t>() + b * H * queries * out.size(3);
  if (lse.defined()) a.lse = lse.mutable_data_ptr<float>() + b * H * queries;
  a.queries = queries, a.words = words;
  a.scale = scale.value_or(1 / std::sqrt(double(d))), a.penalty = std::log(suppression);
  return a;
}

// x: [B, G, L, width] with unit stride in width
template <typename scalar_t>
HeadRows<scalar_t> head_rows(const at::Tensor& x, int64_t b, int64_t g) {
  return {x.const_data_ptr<scalar_t>() + b * x.stride(0) + g * x.stride(1), x.stride(2), x.size(3)};
}

}  // namespace vmtc
