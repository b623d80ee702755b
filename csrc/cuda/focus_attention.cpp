// Score, inhibit, attend: the launchers of the three operators over one layout.
#include "focus_attention.h"

#include <torch/library.h>

namespace vmtc::cuda {

at::Tensor focus_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           const at::Tensor& modality, int64_t num_image,
                           std::optional<double> keep_ratio, std::optional<double> threshold,
                           std::string_view aggregate, std::string_view head_mode, bool renormalize,
                           int64_t min_keep, double suppression, std::optional<double> scale,
                           const std::optional<at::Tensor>& text_image,
                           const std::optional<at::Tensor>& positions, int64_t stream) {
  constexpr char OP[] = "focus_attention";
  check_attention(q_in, k_in, v_in, modality.size(-1));
  const c10::OptionalDeviceGuard guard(q_in.device());
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in), v = unit_rows(v_in);
  const Sequence sequence = sequence_of(modality, positions, q, q.size(2));
  const LayoutMemory layout(sequence, true, q);
  MaskedAttentionArgs attention = attention_args(q, k, v, suppression, scale);
  attention.layout = layout.layout;
  FocusMaskArgs selection = mask_args(keep_ratio, threshold, min_keep);
  check_launched(focus_layout(layout.layout, stream_of(stream)), OP);

  const int64_t M = head_mode == "mean" ? 1 : attention.H, W = (num_image + 31) / 32;
  at::Tensor mask, logits;
  {
    // its memory is free again for the attention, but for logits that are kept
    const ScoresCall call(q, k, layout.layout, num_image, aggregate, head_mode, renormalize, scale,
                          text_image);
    check_launched(focus_scores(call.args, stream_of(stream)), OP);
    mask = at::empty({sequence.B, M, sequence.Lq, W}, q.options().dtype(at::kInt));
    selection.layout = layout.layout;
    selection.scores = call.args.scores;
    selection.dtype = Dtype::float32;
    selection.batch_stride = M * sequence.Lq * num_image;
    selection.head_stride = sequence.Lq * num_image;
    selection.row_stride = num_image, selection.image_stride = 1;
    selection.M = M, selection.I = num_image;
    selection.mask = mask.mutable_data_ptr<int32_t>();
    check_launched(focus_mask(selection, stream_of(stream)), OP);
    attention.logits = focus_logits(call.args);
    if (attention.logits) logits = call.workspace;
  }

  set_mask(attention, mask);
  const at::Tensor workspace = make_workspace(masked_attention_workspace(attention), q);
  at::Tensor out = at::empty({sequence.B, attention.H, sequence.Lq, attention.dv}, q.options());
  attention.workspace = workspace.mutable_data_ptr();
  attention.out = out.mutable_data_ptr();
  check_launched(masked_attention(attention, stream_of(stream)), OP);
  return out;
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("focus_attention", focus_attention); }

}  // namespace vmtc::cuda
