#include "token_importance.h"

#include <torch/library.h>

#include <cmath>

#include "tensors.h"

namespace vmtc::cuda {
namespace {

Heads heads_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// q, k: [B, H, N, d] -> f32 [B, N]
at::Tensor run(const at::Tensor& q_in, const at::Tensor& k_in, std::optional<int64_t> cls_index,
               std::optional<double> scale, int64_t stream) {
  check_tensor(q_in, "q", 4);
  check_tensor(k_in, "k", 4);
  check_same_device(k_in, "k", q_in);
  TORCH_CHECK_VALUE(q_in.sizes() == k_in.sizes() && q_in.scalar_type() == k_in.scalar_type(),
                    "k must be ", q_in.scalar_type(), " ", q_in.sizes(), " like q, got ",
                    k_in.scalar_type(), " ", k_in.sizes());
  const c10::OptionalDeviceGuard guard(q_in.device());
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in);
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), d = q.size(3);
  TORCH_CHECK_VALUE(H > 0 && d > 0, "q must have heads and features, got ", q.sizes());
  TORCH_CHECK_VALUE(!cls_index || (*cls_index >= 0 && *cls_index < N), "cls_index must be in [0, ",
                    N, "), got ", cls_index.value_or(0));

  at::Tensor importance = at::empty({B, N}, q.options().dtype(at::kFloat));
  const at::Tensor workspace =
      make_workspace(token_importance_workspace(B, H, N, cls_index.has_value()), q);
  TokenImportanceArgs args{};
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.dtype = dtype_of(q, "q");
  args.B = B, args.H = H, args.N = N, args.d = d;
  args.cls_index = cls_index.value_or(-1);
  args.scale = float(scale ? *scale : 1 / std::sqrt(double(d)));
  args.workspace = workspace.mutable_data_ptr();
  args.importance = importance.mutable_data_ptr<float>();
  check_launched(token_importance(args, stream_of(stream)), "token_importance");
  return importance;
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("token_importance", run); }

}  // namespace
}  // namespace vmtc::cuda
