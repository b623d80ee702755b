#include <torch/library.h>

#include "focus_attention.h"

namespace vmtc {
namespace {

at::Tensor check_table(const at::Tensor& x, const char* name, int64_t B, int64_t dim) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kInt, name, " must be int32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.dim() == dim && x.size(0) == B, name,
                    " must have a row for each sequence, got ", x.sizes());
  return x.contiguous();
}

// cache: [blocks, block_size, G, width] with unit stride in width
template <typename scalar_t>
HeadRows<scalar_t> paged_rows(const at::Tensor& cache, const int32_t* table, int64_t g) {
  return {cache.const_data_ptr<scalar_t>() + g * cache.stride(2),
          cache.stride(1),
          cache.size(3),
          table,
          cache.size(1),
          cache.stride(0)};
}

// q: [B, H, Lq, d], k_cache: [blocks, block_size, G, d], v_cache: [blocks, block_size, G, dv],
// block_table: i32 [B, max_blocks], seq_lens: i32 [B], modality: u8 [B, L],
// text_image: f32 [B, M, L_max, I] -> [B, H, Lq, dv]
at::Tensor paged_focus_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                 const at::Tensor& v_in, const at::Tensor& table_in,
                                 const at::Tensor& lens_in, const at::Tensor& modality_in,
                                 int64_t num_image, std::optional<double> keep_ratio,
                                 std::optional<double> threshold, std::string_view aggregate,
                                 std::string_view head_mode, bool renormalize, int64_t min_keep,
                                 double suppression, std::optional<double> scale,
                                 const std::optional<at::Tensor>& text_image,
                                 const std::optional<at::Tensor>& positions_in) {
  check_queries(q_in, modality_in);
  check_cpu_rows(k_in, "k_cache", 4);
  check_cpu_rows(v_in, "v_cache", 4);
  const int64_t B = q_in.size(0), queries = q_in.size(2), L = modality_in.size(1);
  const int64_t blocks = k_in.size(0), size = k_in.size(1), G = k_in.size(2);
  check_groups(q_in, k_in, G);
  TORCH_CHECK_VALUE(k_in.size(3) == q_in.size(3), "k_cache must have d of q, got ", k_in.sizes());
  TORCH_CHECK_VALUE(v_in.sizes().slice(0, 3) == k_in.sizes().slice(0, 3) && v_in.size(3) > 0,
                    "v_cache must be [blocks, block_size, G, dv], got ", v_in.sizes());
  TORCH_CHECK_TYPE(
      k_in.scalar_type() == q_in.scalar_type() && v_in.scalar_type() == q_in.scalar_type(),
      "k_cache and v_cache must have the dtype of q");
  const at::Tensor table = check_table(table_in, "block_table", B, 2);
  const at::Tensor lens = check_table(lens_in, "seq_lens", B, 1);
  TORCH_CHECK_VALUE(L <= table.size(1) * size, "modality must have at most ", table.size(1) * size,
                    " positions, got ", L);
  const at::Tensor positions = check_positions(positions_in, B, queries);
  const ScoreOptions o = check_options(q_in, G, num_image, aggregate, head_mode, renormalize);
  const at::Tensor state = check_text_image(text_image, o, B, queries, L);
  const Selection selection = check_selection(keep_ratio, threshold, min_keep);
  check_suppression(suppression);
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const at::Tensor modality = modality_in.contiguous();

  const int64_t dv = v.size(3), most = chunk_size(o, queries, q.size(3), L);
  at::Tensor out = at::empty({B, o.heads, queries, dv}, q.options());
  VMTC_DISPATCH(q.scalar_type(), "paged_focus_attention", [&] {
    for_each_image(B, [&](int64_t b, int64_t) {
      const int32_t* row = table.const_data_ptr<int32_t>() + b * table.size(1);
      const int64_t end = std::min<int64_t>(lens.const_data_ptr<int32_t>()[b], L);
      const Sequence s = make_sequence(modality, positions, b, queries, end, [&](int64_t j) {
        return j < end && row[j / size] >= 0 && row[j / size] < blocks;
      });
      focus_sequence(
          attention_of<scalar_t>(q, b, out, {}, scale, suppression, (num_image + 31) / 32), o,
          selection, s, most, dv, text_image_of(state, b),
          [&](int64_t g) { return paged_rows<scalar_t>(k, row, g); },
          [&](int64_t g) { return paged_rows<scalar_t>(v, row, g); });
    });
  });
  if (state.defined() && !state.is_same(*text_image)) text_image->copy_(state);
  return out;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("paged_focus_attention", paged_focus_attention); }

}  // namespace
}  // namespace vmtc
