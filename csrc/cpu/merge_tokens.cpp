#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "lloyd.h"
#include "rows.h"

namespace vmtc {
namespace {

struct Selection {
  std::vector<int32_t> primary, redundant;  // positions, ascending
};

// the `count` valid tokens of highest score, ties to the smaller position, NaN as -inf
Selection select_primary(const float* scores, std::vector<int32_t> order, int64_t count) {
  const auto key = [&](int32_t i) {
    return std::isnan(scores[i]) ? -std::numeric_limits<float>::infinity() : scores[i];
  };
  const int64_t kept = std::min<int64_t>(count, order.size());
  std::nth_element(order.begin(), order.begin() + kept, order.end(), [&](int32_t i, int32_t j) {
    return key(i) > key(j) || (key(i) == key(j) && i < j);
  });
  Selection selection{{order.begin(), order.begin() + kept}, {order.begin() + kept, order.end()}};
  std::sort(selection.primary.begin(), selection.primary.end());
  std::sort(selection.redundant.begin(), selection.redundant.end());
  return selection;
}

// out = sum w_i x_i / sum w_i over the members, in float32
template <typename scalar_t>
void merge_cluster(const scalar_t* image, int64_t stride, const int32_t* member, int64_t count,
                   const int32_t* position, const float* score, float* rows_buffer, float* out,
                   int64_t D) {
  const auto positive = [&](int64_t j) {
    const float s = score ? score[position[member[j]]] : 1.f;
    return s > 0 ? s : 0.f;
  };
  double total = 0;  // scores may add up beyond float32
  for (int64_t j = 0; j < count; ++j) total += positive(j);
  const bool uniform = !(total > 0);
  if (uniform) total = count;
  const auto weight = [&](int64_t j) { return float((uniform ? 1 : positive(j)) / total); };
  // weighted_sum reads four rows together, so four are in the buffer
  rows::weighted_sum(
      count,
      [&](int64_t j) {
        return rows::as_float(image + position[member[j]] * stride, rows_buffer + j % 4 * D, D);
      },
      weight, out, D);
}

// x: [B, N, D], scores: [B, N] -> tokens [B, P+K, D], owner i32 [B, N], sizes i32 [B, P+K]
std::tuple<at::Tensor, at::Tensor, at::Tensor> merge_tokens(
    const at::Tensor& x_in, const at::Tensor& scores_in, int64_t num_primary, int64_t num_merged,
    int64_t iterations, c10::string_view metric_name, c10::string_view weighting,
    const std::optional<at::Tensor>& features_in, const std::optional<at::Tensor>& valid_in) {
  check_tokens(x_in, "x");
  check_cpu_rows(scores_in, "scores", 2);
  TORCH_CHECK_VALUE(scores_in.sizes() == x_in.sizes().slice(0, 2), "scores must be [B, N] of x ",
                    x_in.sizes(), ", got ", scores_in.sizes());
  check_count(num_primary, "num_primary", 0);
  check_count(num_merged, "num_merged", 0);
  check_count(iterations, "iterations", 0);
  TORCH_CHECK_VALUE(weighting == "score" || weighting == "uniform",
                    "weighting must be one of ['score', 'uniform'], got '", weighting, "'");
  const Metric metric = parse_metric(metric_name);
  const at::Tensor valid = check_valid(valid_in, x_in);
  const at::Tensor x = unit_rows(x_in);
  const at::Tensor features = features_in.has_value() ? unit_rows(*features_in) : x;
  check_tokens(features, "features");
  TORCH_CHECK_VALUE(features.sizes().slice(0, 2) == x.sizes().slice(0, 2),
                    "features must be [B, N, Df] like x ", x.sizes(), ", got ", features.sizes());
  const at::Tensor scores = scores_in.to(at::kFloat).contiguous();
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), Df = features.size(2);
  const int64_t P = num_primary, K = num_merged, slots = P + K;

  const auto ints = x.options().dtype(at::kInt);
  at::Tensor tokens = at::empty({B, slots, D}, x.options());
  at::Tensor owner = at::empty({B, N}, ints);
  at::Tensor sizes = at::empty({B, slots}, ints);

  if (B == 0) return {tokens, owner, sizes};

  const int64_t most = valid.defined() ? N : std::max<int64_t>(N - P, 0);
  const at::Tensor workspace =
      make_workspace(B, K > 0 ? Lloyd::workspace_size(most, K, Df, features.scalar_type()) : 0);

  VMTC_DISPATCH(x.scalar_type(), "merge_tokens", [&] {
    for_each_image(B, [&](int64_t b, int64_t lane) {
      const scalar_t* image = x.const_data_ptr<scalar_t>() + b * x.stride(0);
      const float* score = scores.const_data_ptr<float>() + b * N;
      scalar_t* out = tokens.mutable_data_ptr<scalar_t>() + b * slots * D;
      int32_t* slot_of = owner.mutable_data_ptr<int32_t>() + b * N;
      int32_t* size = sizes.mutable_data_ptr<int32_t>() + b * slots;
      std::fill_n(slot_of, N, -1);

      const Selection selected = select_primary(score, valid_positions(valid, b, N), P);
      const int64_t kept = selected.primary.size(), redundant = selected.redundant.size();
      for (int64_t p = 0; p < P; ++p) {
        size[p] = p < kept;
        if (p < kept) {
          slot_of[selected.primary[p]] = p;
          std::memcpy(out + p * D, image + selected.primary[p] * x.stride(1), D * sizeof(scalar_t));
        } else {
          std::fill_n(out + p * D, D, scalar_t(0));
        }
      }
      if (K == 0) return;

      Lloyd lloyd(redundant, K, Df, metric, workspace_of(workspace, lane));
      lloyd.load(features, b, selected.redundant);
      lloyd.run(iterations);

      for (int64_t i = 0; i < redundant; ++i)
        slot_of[selected.redundant[i]] = P + lloyd.labels()[i];
      std::copy_n(lloyd.sizes().data(), K, size + P);
      at::parallel_for(0, K, grain(redundant * D / K), [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(5 * D);
        for (int64_t k = begin; k < end; ++k) {
          merge_cluster(image, x.stride(1), lloyd.members(k), lloyd.sizes()[k],
                        selected.redundant.data(), weighting == "score" ? score : nullptr,
                        buffer.data() + D, buffer.data(), D);
          rows::from_float(buffer.data(), out + (P + k) * D, D);
        }
      });
    });
  });
  return {tokens, owner, sizes};
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("merge_tokens", merge_tokens); }

}  // namespace
}  // namespace vmtc
