#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "lloyd.h"

namespace vmtc {
namespace {

// x: [B, N, D] -> labels i32 [B, N], centroids f32 [B, K, D], sizes i32 [B, K]
std::tuple<at::Tensor, at::Tensor, at::Tensor> kmeans(const at::Tensor& x_in, int64_t num_clusters,
                                                      int64_t iterations,
                                                      c10::string_view metric_name,
                                                      const std::optional<at::Tensor>& valid_in) {
  check_tokens(x_in, "x");
  check_count(num_clusters, "num_clusters", 1);
  check_count(iterations, "iterations", 0);
  const Metric metric = parse_metric(metric_name);
  const at::Tensor valid = check_valid(valid_in, x_in);
  const at::Tensor x = unit_rows(x_in);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), K = num_clusters;

  const auto ints = x.options().dtype(at::kInt);
  at::Tensor labels = at::empty({B, N}, ints);
  at::Tensor centroids = at::empty({B, K, D}, x.options().dtype(at::kFloat));
  at::Tensor sizes = at::empty({B, K}, ints);

  if (B == 0) return {labels, centroids, sizes};

  const at::Tensor workspace = make_workspace(B, Lloyd::workspace_size(N, K, D, x.scalar_type()));

  for_each_image(B, [&](int64_t b, int64_t lane) {
    const std::vector<int32_t> positions = valid_positions(valid, b, N);
    Lloyd lloyd(positions.size(), K, D, metric, workspace_of(workspace, lane));
    lloyd.load(x, b, positions);
    lloyd.run(iterations);

    int32_t* label = labels.mutable_data_ptr<int32_t>() + b * N;
    std::fill_n(label, N, -1);
    for (size_t i = 0; i < positions.size(); ++i) label[positions[i]] = lloyd.labels()[i];
    std::copy_n(lloyd.sizes().data(), K, sizes.mutable_data_ptr<int32_t>() + b * K);
    lloyd.means(centroids.mutable_data_ptr<float>() + b * K * D);
  });
  return {labels, centroids, sizes};
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("kmeans", kmeans); }

}  // namespace
}  // namespace vmtc
