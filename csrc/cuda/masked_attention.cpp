#include "masked_attention.h"

#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "focus_tensors.h"

namespace vmtc::cuda {
namespace {

// q: [B, H, Lq, d], k: [B, G, L, d], v: [B, G, L, dv], modality: u8 [B, L], mask: i32 [B, M, Lq, W]
// -> [B, H, Lq, dv], f32 [B, H, Lq]
std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& q_in, const at::Tensor& k_in,
                                       const at::Tensor& v_in, const at::Tensor& modality,
                                       const at::Tensor& mask_in, double suppression,
                                       std::optional<double> scale,
                                       const std::optional<at::Tensor>& positions, int64_t stream) {
  check_attention(q_in, k_in, v_in, modality.size(-1));
  const c10::OptionalDeviceGuard guard(q_in.device());
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const Sequence sequence = sequence_of(modality, positions, q, q.size(2));
  check_mask(mask_in, q);
  const at::Tensor mask = unit_rows(mask_in);

  MaskedAttentionArgs args = attention_args(q, k, v, suppression, scale);
  const LayoutMemory layout(sequence, false, q);
  args.layout = layout.layout;
  const at::Tensor workspace = make_workspace(masked_attention_workspace(args), q);
  at::Tensor out = at::empty({sequence.B, args.H, sequence.Lq, args.dv}, q.options());
  at::Tensor lse = at::empty({sequence.B, args.H, sequence.Lq}, q.options().dtype(at::kFloat));
  set_mask(args, mask);
  args.workspace = workspace.mutable_data_ptr();
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  check_launched(focus_layout(args.layout, stream_of(stream)), "masked_attention");
  check_launched(masked_attention(args, stream_of(stream)), "masked_attention");
  return {out, lse};
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("masked_attention", run); }

}  // namespace
}  // namespace vmtc::cuda
