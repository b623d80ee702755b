// From the tensors that the operators of focus share to their arguments.
#pragma once

#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>

#include "focus.h"
#include "focus_mask.h"
#include "focus_scores.h"
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
  TORCH_CHECK_VALUE(
      modality.size(0) == like.size(0) && Lq <= L && L <= std::numeric_limits<int32_t>::max(),
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

// a layout and its memory
struct LayoutMemory {
  at::Tensor memory;
  Layout layout;

  LayoutMemory(const Sequence& sequence, bool with_rows, const at::Tensor& like) {
    Workspace counted;
    carve_layout(counted, sequence, with_rows);
    memory = make_workspace(counted.bytes(), like);
    Workspace carved(memory.mutable_data_ptr());
    layout = carve_layout(carved, sequence, with_rows);
  }
};

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
  // of the float64: float32 may round it to 0
  args.penalty = float(std::log(suppression));
  args.scale = scale_or_default(scale, args.d);
  return args;
}

// mask: i32 [B, M, Lq, W] as unit_rows returns it
inline void set_mask(MaskedAttentionArgs& args, const at::Tensor& mask) {
  args.mask = mask.const_data_ptr<int32_t>();
  args.mask_batch_stride = mask.stride(0);
  args.mask_head_stride = mask.size(1) == 1 ? 0 : mask.stride(1);
  args.mask_row_stride = mask.stride(2);
  args.W = mask.size(3);
}

inline void check_images(int64_t I) {
  TORCH_CHECK_VALUE(I >= 0 && I <= std::numeric_limits<int32_t>::max() - 32,
                    "num_image must be in [0, 2^31 - 32), got ", I);
}

// what does not depend on the scores, the layout and the memory
inline FocusMaskArgs mask_args(std::optional<double> keep_ratio, std::optional<double> threshold,
                               int64_t min_keep) {
  TORCH_CHECK_VALUE(keep_ratio.has_value() != threshold.has_value(),
                    "exactly one of keep_ratio and threshold must be given");
  check_count(min_keep, "min_keep", 1);
  FocusMaskArgs args{};
  args.by_ratio = keep_ratio.has_value();
  args.keep_ratio = keep_ratio.value_or(0);
  args.threshold = float(threshold.value_or(0));
  args.min_keep = min_keep;
  return args;
}

// The arguments of focus_scores and the tensors that they point into.
struct ScoresCall {
  at::Tensor state, workspace, scores;
  FocusScoresArgs args{};

  // text_image: f32 [B, M, L_max, I], or nothing where the queries are all positions
  ScoresCall(const at::Tensor& q, const at::Tensor& k, const Layout& layout, int64_t num_image,
             std::string_view aggregate, std::string_view head_mode, bool renormalize,
             std::optional<double> scale, const std::optional<at::Tensor>& text_image) {
    const Sequence& sequence = layout.sequence;
    check_images(num_image);
    TORCH_CHECK_VALUE(aggregate == "product" || aggregate == "residual",
                      "aggregate must be one of ['product', 'residual'], got '", aggregate, "'");
    TORCH_CHECK_VALUE(head_mode == "mean" || head_mode == "per_head",
                      "head_mode must be one of ['mean', 'per_head'], got '", head_mode, "'");
    args.layout = layout;
    args.q = heads_of_tensor(q);
    args.k = heads_of_tensor(k);
    args.dtype = dtype_of(q, "q");
    args.H = q.size(1), args.G = k.size(1), args.d = q.size(3), args.I = num_image;
    args.residual = aggregate == "residual";
    args.per_head = head_mode == "per_head";
    args.renormalize = renormalize;
    args.scale = scale_or_default(scale, args.d);
    const int64_t M = args.per_head ? args.H : 1;
    const auto floats = q.options().dtype(at::kFloat);
    if (text_image.has_value()) {
      state = *text_image;
      check_tensor(state, "text_image", 4);
      check_same_device(state, "text_image", q);
      TORCH_CHECK_VALUE(state.scalar_type() == at::kFloat && state.size(0) == sequence.B &&
                            state.size(1) == M && state.size(2) >= sequence.L &&
                            state.size(3) == num_image,
                        "text_image must be float32 [B, M, L_max, I] with L_max at least L, got ",
                        state.scalar_type(), " ", state.sizes());
    } else {
      TORCH_CHECK_VALUE(sequence.Lq == sequence.L,
                        "text_image must be given where there are fewer queries than positions");
      // with places of their own, queries may leave text out, whose rows are zeros
      const std::array<int64_t, 4> sizes{sequence.B, M, sequence.L, num_image};
      state = sequence.positions ? at::zeros(sizes, floats) : at::empty(sizes, floats);
    }
    args.text_image = state.mutable_data_ptr<float>();
    args.state_batch_stride = state.stride(0), args.state_head_stride = state.stride(1);
    args.state_row_stride = state.stride(2), args.state_image_stride = state.stride(3);
    scores = at::empty({sequence.B, M, sequence.Lq, num_image}, floats);
    workspace = make_workspace(focus_scores_workspace(args), q);
    args.workspace = workspace.mutable_data_ptr();
    args.scores = scores.mutable_data_ptr<float>();
  }
};

}  // namespace vmtc::cuda
