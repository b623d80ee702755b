// From the tensors that the operators of focus share to their arguments.
#pragma once

#include <cmath>

#include "focus.h"
#include "masked_attention.h"
#include "tensors.h"

namespace vmtc::cuda {

// x: [B, H, L, d] as unit_rows returns it
inline Heads heads_of_tensor(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// modality: u8 [B, L]; positions: i32 [B, Lq]; like: [B, ...] with Lq queries
inline Sequence sequence_of(const at::Tensor& modality, const std::optional<at::Tensor>& positions,
                            const at::Tensor& like, int64_t Lq) {
  check_tensor(modality, "modality", 2);
  check_same_device(modality, "modality", like);
  const int64_t L = modality.size(1);
  TORCH_CHECK_TYPE(modality.scalar_type() == at::kByte, "modality must be uint8, got ",
                   modality.scalar_type());
  TORCH_CHECK_VALUE(modality.size(0) == like.size(0) && Lq <= L &&
                        L <= std::numeric_limits<int32_t>::max(),
                    "modality must be [B, L] with L at least ", Lq, ", got ", modality.sizes());
  Sequence sequence{};
  sequence.modality = modality.const_data_ptr<uint8_t>();
  sequence.modality_batch_stride = modality.stride(0);
  sequence.modality_stride = modality.stride(1);
  if (positions.has_value()) {
    check_tensor(*positions, "query_positions", 2);
    check_same_device(*positions, "query_positions", like);
    TORCH_CHECK_TYPE(positions->scalar_type() == at::kInt, "query_positions must be int32, got ",
                     positions->scalar_type());
    TORCH_CHECK_VALUE(positions->size(0) == like.size(0) && positions->size(1) == Lq,
                      "query_positions must be [B, Lq], got ", positions->sizes());
    sequence.positions = positions->const_data_ptr<int32_t>();
    sequence.positions_batch_stride = positions->stride(0);
    sequence.positions_stride = positions->stride(1);
  }
  sequence.B = like.size(0), sequence.L = L, sequence.Lq = Lq;
  return sequence;
}

// q: [B, H, Lq, d], k: [B, G, L, d]
inline void check_keys(const at::Tensor& q, const at::Tensor& k, int64_t L) {
  check_tensor(q, "q", 4);
  check_tensor(k, "k", 4);
  check_same_device(k, "k", q);
  const int64_t H = q.size(1), G = k.size(1), d = q.size(3);
  TORCH_CHECK_VALUE(H > 0 && G > 0 && H % G == 0, "the heads of q must be a multiple of those of k",
                    ", got ", H, " and ", G);
  TORCH_CHECK_VALUE(d > 0 && d <= 256, "heads must have 1 to 256 features, got ", d);
  TORCH_CHECK_VALUE(k.size(0) == q.size(0) && k.size(2) == L && k.size(3) == d &&
                        k.scalar_type() == q.scalar_type(),
                    "k must be ", q.scalar_type(), " [B, G, L, d], got ", k.scalar_type(), " ",
                    k.sizes());
}

inline float scale_or_default(std::optional<double> scale, int64_t d) {
  return float(scale ? *scale : 1 / std::sqrt(double(d)));
}

// v: [B, G, L, dv]
inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            int64_t L) {
  check_keys(q, k, L);
  check_tensor(v, "v", 4);
  check_same_device(v, "v", q);
  TORCH_CHECK_VALUE(v.sizes().slice(0, 3) == k.sizes().slice(0, 3) && v.size(3) > 0 &&
                        v.size(3) <= 256 && v.scalar_type() == q.scalar_type(),
                    "v must be ", q.scalar_type(), " [B, G, L, dv] with dv of 1 to 256, got ",
                    v.scalar_type(), " ", v.sizes());
}

// mask: i32 [B, M, Lq, W] for q [B, H, Lq, d]
inline void check_mask(const at::Tensor& mask, const at::Tensor& q) {
  check_tensor(mask, "mask", 4);
  check_same_device(mask, "mask", q);
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kInt, "mask must be int32, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.size(0) == q.size(0) && (mask.size(1) == 1 || mask.size(1) == q.size(1)) &&
                        mask.size(2) == q.size(2),
                    "mask must be [B, M, Lq, W] with M 1 or the heads of q, got ", mask.sizes());
}

// what does not depend on the mask, the layout and the memory
inline MaskedAttentionArgs attention_args(const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v, double suppression,
                                          std::optional<double> scale) {
  MaskedAttentionArgs args{};
  args.q = heads_of_tensor(q);
  args.k = heads_of_tensor(k);
  args.v = heads_of_tensor(v);
  args.dtype = dtype_of(q, "q");
  args.H = q.size(1), args.G = k.size(1), args.d = q.size(3), args.dv = v.size(3);
  args.suppression = float(suppression);
  args.scale = scale_or_default(scale, args.d);
  return args;
}

}  // namespace vmtc::cuda
