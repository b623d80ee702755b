#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include "rows.h"

namespace vmtc {
namespace {

// queries whose attention rows exist at one time
constexpr int64_t BLOCK = 64;

// attention [H, N] of one image: softmax(scale q_c k^T) of every head
template <typename scalar_t>
void cls_attention(const at::Tensor& q, const at::Tensor& k, int64_t b, int64_t cls, float scale,
                   float* attention) {
  const int64_t H = q.size(1), N = q.size(2), d = q.size(3);
  const scalar_t* keys = k.const_data_ptr<scalar_t>() + b * k.stride(0);
  std::vector<float> queries(H * d);
  for (int64_t h = 0; h < H; ++h) {
    float* out = queries.data() + h * d;
    rows::to_float(
        q.const_data_ptr<scalar_t>() + b * q.stride(0) + h * q.stride(1) + cls * q.stride(2), out,
        d);
    rows::scale(out, scale, out, d);
  }
  const int64_t head_stride = k.stride(1), key_stride = k.stride(2);
  const float* query = queries.data();
  const auto logit = [=](int64_t h, int64_t i) {
    attention[h * N + i] = rows::dot(query + h * d, keys + h * head_stride + i * key_stride, d);
  };
  // in the order in which the keys lie in memory
  if (head_stride < key_stride) {
    at::parallel_for(0, N, grain(H * d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < H; ++h) logit(h, i);
    });
    at::parallel_for(0, H, grain(16 * N), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) rows::softmax(attention + h * N, N);
    });
  } else {
    at::parallel_for(0, H, grain(N * d), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t i = 0; i < N; ++i) logit(h, i);
        rows::softmax(attention + h * N, N);
      }
    });
  }
}

// rows of one head as a float32 matrix [N, d]: in place, or converted into storage. No operation on
// the caller's tensor, which may require gradients: worker threads would record it.
template <typename scalar_t>
at::Tensor head_matrix(const scalar_t* x, int64_t stride, int64_t N, int64_t d,
                       std::vector<float>& storage) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return at::from_blob(const_cast<float*>(x), {N, d}, {stride, 1}, at::kFloat);
  } else {
    storage.resize(N * d);
    for (int64_t i = 0; i < N; ++i) rows::to_float(x + i * stride, storage.data() + i * d, d);
    return at::from_blob(storage.data(), {N, d}, at::kFloat);
  }
}

// received[j] = sum over all queries of one head of their attention to j; q, k: f32 [N, d]
void attention_columns(const at::Tensor& q, const at::Tensor& k, float scale, float* received) {
  const int64_t N = q.size(0);
  std::fill_n(received, N, 0.f);
  std::vector<float> block_received(N);
  at::Tensor logits = at::empty({std::min(BLOCK, N), N}, at::kFloat);
  for (int64_t begin = 0; begin < N; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, N - begin);
    at::Tensor block = logits.narrow(0, 0, count);
    at::mm_out(block, at::mul(q.narrow(0, begin, count), scale), k.t());
    float* row = block.mutable_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) rows::softmax(row + i * N, N);
    // block by block, so that the error of the sum stays that of short sums
    rows::weighted_sum(
        count, [&](int64_t i) { return row + i * N; }, [](int64_t) { return 1.f; },
        block_received.data(), N);
    rows::each_vector(N, [&](int64_t j, int64_t n) {
      rows::store(rows::load(received + j, n) + rows::load(block_received.data() + j, n),
                  received + j, n);
    });
  }
}

// q, k: [B, H, N, d] -> f32 [B, N]
at::Tensor token_importance(const at::Tensor& q_in, const at::Tensor& k_in,
                            std::optional<int64_t> cls_index, std::optional<double> scale_in) {
  check_cpu_rows(q_in, "q", 4);
  check_cpu_rows(k_in, "k", 4);
  TORCH_CHECK_VALUE(q_in.sizes() == k_in.sizes() && q_in.scalar_type() == k_in.scalar_type(),
                    "k must be ", q_in.scalar_type(), " ", q_in.sizes(), " like q, got ",
                    k_in.scalar_type(), " ", k_in.sizes());
  const at::Tensor q = unit_rows(q_in), k = unit_rows(k_in);
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), d = q.size(3);
  TORCH_CHECK_VALUE(H > 0 && d > 0, "q must have heads and features, got ", q.sizes());
  TORCH_CHECK_VALUE(!cls_index || (*cls_index >= 0 && *cls_index < N), "cls_index must be in [0, ",
                    N, "), got ", cls_index.value_or(0));
  const float scale = scale_in ? *scale_in : 1 / std::sqrt(double(d));

  at::Tensor importance = at::empty({B, N}, at::kFloat);
  at::Tensor heads = at::empty({B, H, N}, at::kFloat);  // what each head gives
  float* given = heads.mutable_data_ptr<float>();
  if (cls_index) {
    VMTC_DISPATCH(q.scalar_type(), "token_importance", [&] {
      for_each_image(B, [&](int64_t b, int64_t) {
        cls_attention<scalar_t>(q, k, b, *cls_index, scale, given + b * H * N);
      });
    });
  } else {
    VMTC_DISPATCH(q.scalar_type(), "token_importance", [&] {
      at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> queries, keys;
        const auto head_of = [&](const at::Tensor& x, int64_t head, std::vector<float>& storage) {
          const int64_t offset = head / H * x.stride(0) + head % H * x.stride(1);
          return head_matrix(x.const_data_ptr<scalar_t>() + offset, x.stride(2), N, d, storage);
        };
        for (int64_t head = begin; head < end; ++head)
          attention_columns(head_of(q, head, queries), head_of(k, head, keys), scale,
                            given + head * N);
      });
    });
  }

  const float share = 1.f / (cls_index ? H : H * N);
  at::parallel_for(0, B, grain(H * N), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      rows::weighted_sum(
          H, [&](int64_t h) { return given + (b * H + h) * N; }, [&](int64_t) { return share; },
          importance.mutable_data_ptr<float>() + b * N, N);
  });
  return importance;
}

TORCH_LIBRARY_IMPL(vmtc_cpu, CPU, m) { m.impl("token_importance", token_importance); }

}  // namespace
}  // namespace vmtc
