#include "kmeans.h"

#include <torch/library.h>

#include "primary.h"
#include "segment_mean.h"
#include "tensors.h"

namespace vmtc::cuda {
namespace {

struct Memory {
  int32_t *rows, *counts, *labels, *members, *offsets;
  float* scale;
  char* cluster;

  Memory(const ClusterArgs& args, Workspace& workspace)
      : rows(workspace.take<int32_t>(args.B * args.N)),
        counts(workspace.take<int32_t>(args.B)),
        labels(workspace.take<int32_t>(args.B * args.C)),
        members(workspace.take<int32_t>(args.B * args.C)),
        offsets(workspace.take<int32_t>(args.B * (args.K + 1))),
        scale(workspace.take<float>(args.B * args.C)),
        cluster(workspace.take<char>(cluster_workspace(args))) {}
};

// x: [B, N, D] -> labels i32 [B, N], centroids f32 [B, K, D], sizes i32 [B, K]
std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const at::Tensor& x_in, int64_t num_clusters,
                                                   int64_t iterations, c10::string_view metric,
                                                   const std::optional<at::Tensor>& valid,
                                                   int64_t stream_number) {
  check_tokens(x_in, "x");
  check_count(num_clusters, "num_clusters", 1);
  check_count(iterations, "iterations", 0);
  check_valid(valid, x_in);
  const c10::OptionalDeviceGuard guard(x_in.device());
  const at::Tensor x = unit_rows(x_in);

  ClusterArgs args{};
  args.x = rows_of(x, "x");
  args.B = x.size(0), args.N = x.size(1), args.D = x.size(2), args.K = num_clusters;
  args.C = args.N;
  args.iterations = iterations;
  args.metric = parse_metric(metric);
  const auto ints = x.options().dtype(at::kInt);
  at::Tensor labels = at::empty({args.B, args.N}, ints);
  at::Tensor centroids = at::empty({args.B, args.K, args.D}, x.options().dtype(at::kFloat));
  at::Tensor sizes = at::empty({args.B, args.K}, ints);
  Workspace counted;
  Memory(args, counted);
  const at::Tensor bytes = make_workspace(counted.bytes(), x);
  Workspace workspace(bytes.mutable_data_ptr());
  const Memory memory(args, workspace);

  PrimaryArgs everyone{};
  if (valid.has_value()) {
    everyone.valid = valid->const_data_ptr<bool>();
    everyone.valid_image_stride = valid->stride(0), everyone.valid_stride = valid->stride(1);
  }
  everyone.B = args.B, everyone.N = args.N;
  // -1 for now, which stays for tokens that are not valid
  everyone.owner = labels.mutable_data_ptr<int32_t>();
  everyone.rows = memory.rows;
  everyone.counts = memory.counts;
  const cudaStream_t stream = stream_of(stream_number);
  check_launched(select_primary(everyone, stream), "kmeans");

  args.rows = memory.rows;
  args.counts = memory.counts;
  args.workspace = memory.cluster;
  args.labels = memory.labels;
  args.sizes = sizes.mutable_data_ptr<int32_t>();
  args.members = memory.members;
  args.offsets = memory.offsets;
  args.scale = memory.scale;
  check_launched(cluster(args, stream), "kmeans");

  SegmentMeanArgs mean{};
  mean.x = args.x;
  mean.B = args.B, mean.N = args.N, mean.D = args.D, mean.C = args.C, mean.K = args.K;
  mean.rows = memory.rows;
  mean.members = memory.members;
  mean.offsets = memory.offsets;
  mean.scale = memory.scale;
  mean.means = centroids.mutable_data_ptr<float>();
  mean.labels = labels.mutable_data_ptr<int32_t>();
  check_launched(segment_mean(mean, stream), "kmeans");
  return {labels, centroids, sizes};
}

TORCH_LIBRARY_IMPL(vmtc_cuda, VMTC_CUDA_KEY, m) { m.impl("kmeans", run); }

}  // namespace
}  // namespace vmtc::cuda
