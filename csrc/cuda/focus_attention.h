// The operator as a function, for the one that puts a paged cache in a row first.
#pragma once

#include "focus_tensors.h"

namespace vmtc::cuda {

// q: [B, H, Lq, d], k: [B, G, L, d], v: [B, G, L, dv], modality: u8 [B, L],
// text_image: f32 [B, M, L_max, I] -> [B, H, Lq, dv]
at::Tensor focus_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& modality, int64_t num_image,
                           std::optional<double> keep_ratio, std::optional<double> threshold,
                           std::string_view aggregate, std::string_view head_mode, bool renormalize,
                           int64_t min_keep, double suppression, std::optional<double> scale,
                           const std::optional<at::Tensor>& text_image,
                           const std::optional<at::Tensor>& positions, int64_t stream);

}  // namespace vmtc::cuda
