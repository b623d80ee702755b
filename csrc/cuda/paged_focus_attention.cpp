// The blocks of each sequence put in a row, then focus_attention: what the fallback does with a
// paged cache. It reads and writes the sequences' keys and values once more than it must.
#include <ATen/ops/arange.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "focus_attention.h"

namespace vmtc::cuda {
namespace {

// cache: [blocks, block_size, G, width], blocks: i64 [B * n] -> [B, G, L, width]
at::Tensor in_a_row(const at::Tensor& cache, const at::Tensor& blocks, int64_t B, int64_t L) {
  const at::Tensor rows = at::index_select(cache, 0, blocks);
  return rows.view({B, -1, cache.size(2), cache.size(3)}).narrow(1, 0, L).transpose(1, 2);
}

// q: [B, H, Lq, d], k_cache: [blocks, block_size, G, d], v_cache: [blocks, block_size, G, dv],
// block_table: i32 [B, max_blocks], seq_lens: i32 [B], modality: u8 [B, L],
// text_image: f32 [B, M, L_max, I] -> [B, H, Lq, dv]
at::Tensor run(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const at::Tensor& block_table, const at::Tensor& seq_lens,
               const at::Tensor& modality, int64_t num_image, std::optional<double> keep_ratio,
               std::optional<double> threshold, std::string_view aggregate,
               std::string_view head_mode, bool renormalize, int64_t min_keep, double suppression,
               std::optional<double> scale, const std::optional<at::Tensor>& text_image,
               const std::optional<at::Tensor>& positions, int64_t stream) {
  check_tensor(q, "q", 4);
  check_tensor(k_cache, "k_cache", 4);
  check_tensor(v_cache, "v_cache", 4);
  check_tensor(block_table, "block_table", 2);
  check_tensor(seq_lens, "seq_lens", 1);
  check_tensor(modality, "modality", 2);
  const int64_t B = q.size(0), Lq = q.size(2), L = modality.size(1), size = k_cache.size(1);
  const int64_t blocks = k_cache.size(0);
  TORCH_CHECK_VALUE(blocks > 0 && size > 0, "k_cache must have blocks, got ", k_cache.sizes());
  TORCH_CHECK_VALUE(v_cache.size(0) == blocks && v_cache.size(1) == size,
                    "v_cache must have the blocks of k_cache, got ", v_cache.sizes());
  TORCH_CHECK_VALUE(
      block_table.size(0) == B && seq_lens.size(0) == B && L <= block_table.size(1) * size,
      "block_table must have room for ", L, " positions, got ", block_table.sizes());
  const c10::OptionalDeviceGuard guard(q.device());
  const int64_t used = (L + size - 1) / size;
  const at::Tensor table = block_table.narrow(1, 0, used);
  const at::Tensor there = table.ge(0).logical_and_(table.lt(blocks));
  // a block that is none is read as the first, and its keys are padding
  const at::Tensor index = at::where(there, table, 0).to(at::kLong).flatten();
  const at::Tensor place = at::arange(L, seq_lens.options());
  const at::Tensor inside =
      there.repeat_interleave(size, 1).narrow(1, 0, L).logical_and(place.lt(seq_lens.unsqueeze(1)));
  at::Tensor at = positions.value_or(at::Tensor());
  if (!at.defined())
    at = seq_lens.clamp_max(L).unsqueeze(1).add(at::arange(-Lq, 0, seq_lens.options()));
  return focus_attention(q, in_a_row(k_cache, index, B, L), in_a_row(v_cache, index, B, L),
                         modality.masked_fill(inside.logical_not(), 0), num_image, keep_ratio,
                         threshold, aggregate, head_mode, renormalize, min_keep, suppression, scale,
                         text_image, at, stream);
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("paged_focus_attention", run); }

}  // namespace
}  // namespace vmtc::cuda
