#include "focus_scores.h"

#include <torch/library.h>

#include "focus_tensors.h"

namespace vmtc::cuda {
namespace {

// q: [B, H, Lq, d], k: [B, G, L, d], modality: u8 [B, L], text_image: f32 [B, M, L_max, I]
// -> f32 [B, M, Lq, I]
at::Tensor run(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& modality,
               int64_t num_image, std::string_view aggregate, std::string_view head_mode,
               bool renormalize, std::optional<double> scale,
               const std::optional<at::Tensor>& text_image,
               const std::optional<at::Tensor>& positions, int64_t stream) {
  check_keys(q_in, k_in, modality.size(-1));
  const c10::OptionalDeviceGuard guard(q_in.device());
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in);
  const Sequence sequence = sequence_of(modality, positions, q, q.size(2));
  const LayoutMemory layout(sequence, true, q);
  ScoresCall call(q, k, layout.layout, num_image, aggregate, head_mode, renormalize, scale,
                  text_image);
  check_launched(focus_layout(layout.layout, stream_of(stream)), "focus_scores");
  call.args.all_rows = true;
  check_launched(focus_scores(call.args, stream_of(stream)), "focus_scores");
  return call.scores;
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("focus_scores", run); }

}  // namespace
}  // namespace vmtc::cuda
