#include "focus_mask.h"

#include <torch/library.h>

#include "focus_tensors.h"

namespace vmtc::cuda {
namespace {

// scores: [B, M, Lq, I], modality: u8 [B, L] -> i32 [B, M, Lq, ceil(I / 32)]
at::Tensor run(const at::Tensor& scores, const at::Tensor& modality,
               std::optional<double> keep_ratio, std::optional<double> threshold, int64_t min_keep,
               const std::optional<at::Tensor>& positions, int64_t stream) {
  check_tensor(scores, "scores", 4);
  const c10::OptionalDeviceGuard guard(scores.device());
  const Sequence sequence = sequence_of(modality, positions, scores, scores.size(2));
  FocusMaskArgs args = mask_args(keep_ratio, threshold, min_keep);
  args.scores = scores.const_data_ptr();
  args.dtype = dtype_of(scores, "scores");
  args.batch_stride = scores.stride(0), args.head_stride = scores.stride(1);
  args.row_stride = scores.stride(2), args.image_stride = scores.stride(3);
  args.M = scores.size(1), args.I = scores.size(3);
  check_images(args.I);

  at::Tensor mask = at::empty({sequence.B, args.M, sequence.Lq, (args.I + 31) / 32},
                              scores.options().dtype(at::kInt));
  args.mask = mask.mutable_data_ptr<int32_t>();
  const LayoutMemory layout(sequence, false, scores);
  args.layout = layout.layout;
  check_launched(focus_layout(args.layout, stream_of(stream)), "focus_mask");
  check_launched(focus_mask(args, stream_of(stream)), "focus_mask");
  return mask;
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("focus_mask", run); }

}  // namespace
}  // namespace vmtc::cuda
