#include "merge_tokens.h"

#include <torch/library.h>

#include "tensors.h"

namespace vmtc::cuda {
namespace {

// x: [B, N, D], scores: [B, N] -> tokens [B, P+K, D], owner i32 [B, N], sizes i32 [B, P+K]
std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x_in, const at::Tensor& scores,
                                                   int64_t num_primary, int64_t num_merged,
                                                   int64_t iterations, c10::string_view metric,
                                                   c10::string_view weighting,
                                                   const std::optional<at::Tensor>& features_in,
                                                   const std::optional<at::Tensor>& valid,
                                                   int64_t stream) {
  check_tokens(x_in, "x");
  check_tensor(scores, "scores", 2);
  TORCH_CHECK_VALUE(scores.sizes() == x_in.sizes().slice(0, 2), "scores must be [B, N] of x ",
                    x_in.sizes(), ", got ", scores.sizes());
  check_same_device(scores, "scores", x_in);
  check_count(num_primary, "num_primary", 0);
  check_count(num_merged, "num_merged", 0);
  check_count(iterations, "iterations", 0);
  TORCH_CHECK_VALUE(weighting == "score" || weighting == "uniform",
                    "weighting must be one of ['score', 'uniform'], got '", weighting, "'");
  check_valid(valid, x_in);
  const c10::OptionalDeviceGuard guard(x_in.device());
  const at::Tensor x = unit_rows(x_in);
  const at::Tensor features = features_in.has_value() ? unit_rows(*features_in) : x;
  check_tokens(features, "features");
  TORCH_CHECK_VALUE(features.sizes().slice(0, 2) == x.sizes().slice(0, 2),
                    "features must be [B, N, Df] like x ", x.sizes(), ", got ", features.sizes());
  check_same_device(features, "features", x);

  MergeTokensArgs args{};
  args.x = rows_of(x, "x");
  args.features = rows_of(features, "features");
  args.scores = scores.const_data_ptr();
  args.score_image_stride = scores.stride(0), args.score_stride = scores.stride(1);
  args.score_dtype = dtype_of(scores, "scores");
  if (valid.has_value()) {
    args.valid = valid->const_data_ptr<bool>();
    args.valid_image_stride = valid->stride(0), args.valid_stride = valid->stride(1);
  }
  args.B = x.size(0), args.N = x.size(1), args.D = x.size(2), args.Df = features.size(2);
  args.P = num_primary, args.K = num_merged;
  args.iterations = iterations;
  args.metric = parse_metric(metric);
  args.by_score = weighting == "score";

  const int64_t slots = args.P + args.K;
  const auto ints = x.options().dtype(at::kInt);
  at::Tensor tokens = at::empty({args.B, slots, args.D}, x.options());
  at::Tensor owner = at::empty({args.B, args.N}, ints);
  at::Tensor sizes = at::empty({args.B, slots}, ints);
  const at::Tensor workspace = make_workspace(merge_tokens_workspace(args), x);
  args.tokens = tokens.mutable_data_ptr();
  args.owner = owner.mutable_data_ptr<int32_t>();
  args.sizes = sizes.mutable_data_ptr<int32_t>();
  args.workspace = workspace.mutable_data_ptr();
  check_launched(merge_tokens(args, stream_of(stream)), "merge_tokens");
  return {tokens, owner, sizes};
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("merge_tokens", run); }

}  // namespace
}  // namespace vmtc::cuda
