#include "lloyd.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <limits>

#include "rows.h"

namespace vmtc {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_KNOWN = std::numeric_limits<float>::quiet_NaN();
constexpr float EPSILON = std::numeric_limits<float>::epsilon();
// rows of one GEMM call: near the full rate, and enough blocks for the threads. Fixed, so that the
// work is cut in the same places whatever the number of threads.
constexpr int64_t BLOCK = 112;
// features of one GEMM call: a block of rows is gathered in the second-level cache and used there
constexpr int64_t DEPTH = 1024;
// share of the pairs above which one GEMM over all of them is faster than single distances
constexpr double DENSE_SHARE = 0.5;
// one token in so many tells which of the two it is
constexpr int64_t SAMPLING = 8;
// a distance is not computed further once it exceeds the own one by this factor, squared: above 1
// it leaves room in the bound for the rounds to come
constexpr float ROOM = 1.2;

// Bound of the error of |f|^2 + |c|^2 - 2 f.c, relative to |f|^2 + |c|^2, when the GEMM adds DEPTH
// products one after the other, as some do. A GEMM that may round its operands to bfloat16, because
// the process asked for it, loses another 2^-8 in each.
float relative_product_error(int64_t D) {
  const auto set = [](const char* name) {
    const char* value = std::getenv(name);
    return value && std::string_view(value) != "STRICT";
  };
  const bool rounded =
      at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST ||
      set("DNNL_DEFAULT_FPMATH_MODE") || set("ONEDNN_DEFAULT_FPMATH_MODE");
  const float summed = EPSILON * (8 + std::min(D, DEPTH) / 2 + D / DEPTH);
  return rounded ? summed + 0x1p-7f : summed;
}

template <typename Body>
void for_each_block(int64_t tokens, int64_t D, const Body& body) {
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
  at::parallel_for(0, blocks, grain(BLOCK * D), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      body(block * BLOCK, std::min(tokens, (block + 1) * BLOCK));
  });
}

// call(k) for every k with !(x[k] > limit), ascending: NaN counts as below
template <typename Call>
void for_each_below(const float* x, float limit, int64_t K, const Call& call) {
  rows::each_vector(K, [&](int64_t k, int64_t n) {
    // a comparison that holds fills its lane with ones, which is a NaN and not equal to zero
    int below = (rows::load(x + k, n) > rows::Vec(limit)).zero_mask() & ((1 << n) - 1);
    for (; below; below &= below - 1) call(k + __builtin_ctz(below));
  });
}

}  // namespace

int64_t Lloyd::workspace_size(int64_t tokens, int64_t clusters, int64_t D, at::ScalarType dtype) {
  const int64_t copied = dtype == at::kFloat ? 0 : tokens * D;
  return clusters * D * sizeof(double) +
         (clusters * D + tokens * clusters + D + copied) * sizeof(float);
}

Lloyd::Lloyd(int64_t tokens, int64_t clusters, int64_t D, Metric metric, void* workspace)
    : tokens_(tokens),
      clusters_(clusters),
      D_(D),
      metric_(metric),
      tiny_(D * std::numeric_limits<float>::min()),
      sums_(static_cast<double*>(workspace)),
      centroids_(reinterpret_cast<float*>(sums_ + clusters * D)),
      bounds_(centroids_ + clusters * D),
      zeros_(bounds_ + tokens * clusters),
      copy_(zeros_ + D),
      row_(tokens),
      factor_(tokens),
      square_(tokens),
      finite_(tokens),
      own_(tokens),
      upper_(tokens),
      labels_(tokens),
      summed_(tokens, -1),
      sizes_(clusters),
      first_(clusters),
      members_(tokens),
      finite_members_(clusters),
      largest_(clusters),
      centroid_square_(clusters),
      offset_(clusters),
      moved_(clusters),
      changed_(clusters) {
  std::fill_n(zeros_, D, 0.f);
}

void Lloyd::load(const at::Tensor& x, int64_t image, const std::vector<int32_t>& positions) {
  VMTC_DISPATCH(x.scalar_type(), "load", [&] {
    const scalar_t* source = x.const_data_ptr<scalar_t>() + image * x.stride(0);
    at::parallel_for(0, tokens_, grain(D_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* row = source + positions[i] * x.stride(1);
        row_[i] = rows::as_float(row, copy_ + i * D_, D_);
        const float square = rows::dot(row_[i], row_[i], D_);
        finite_[i] = std::isfinite(square);
        const bool unit = metric_ == Metric::cosine && finite_[i] && square > tiny_;
        if (!finite_[i] || (metric_ == Metric::cosine && !unit)) row_[i] = zeros_;
        factor_[i] = unit ? 1.f / std::sqrt(square) : 1.f;
        square_[i] = unit ? 1.f : row_[i] == zeros_ ? 0.f : square;
      }
    });
  });
}

void Lloyd::run(int64_t iterations) {
  if (tokens_ == 0) return;
  seed();
  assign_all();
  repair();
  for (int64_t round = 0; round < iterations; ++round) {
    update_sums();
    move_centroids();
    assign_within_bounds();
    repair();
    if (labels_ == summed_) break;
  }
  count_members();
}

float Lloyd::distance(int64_t i, int64_t k) {
  return metric_ == Metric::cosine ? 1 - factor_[i] * rows::dot(row_[i], centroid(k), D_)
                                   : rows::squared_distance(row_[i], factor_[i], centroid(k), D_);
}

// Euclidean distance at most and at least, of a computed distance; for unit vectors
// |f - c|^2 = 2 (1 - f.c), with an absolute error
float Lloyd::upper(float distance) const {
  if (metric_ == Metric::euclidean) return std::sqrt(distance + tiny_) * (1 + 1e-5f);
  return std::sqrt(std::max(0.f, 2 * distance) + EPSILON * (8 + D_ / 64));
}

float Lloyd::lower(float distance) const {
  if (metric_ == Metric::euclidean) return std::sqrt(std::max(0.f, distance - tiny_)) * (1 - 1e-5f);
  return std::sqrt(std::max(0.f, 2 * distance - EPSILON * (8 + D_ / 64)));
}

bool Lloyd::has_euclidean_form() const {
  return metric_ == Metric::euclidean ||
         *std::min_element(centroid_square_.begin(), centroid_square_.end()) > 0;
}

void Lloyd::assign_all() {
  product_error_ = relative_product_error(D_);
  largest_square_ = *std::max_element(centroid_square_.begin(), centroid_square_.end());
  bounds_hold_ = has_euclidean_form();
  const at::Tensor centroids = at::from_blob(centroids_, {clusters_, D_}, at::kFloat);
  for_each_block(tokens_, D_, [&](int64_t begin, int64_t end) {
    const int64_t rows_here = end - begin;
    at::Tensor products = at::from_blob(bounds(begin), {rows_here, clusters_}, at::kFloat);
    const at::Tensor gathered = at::empty({rows_here * std::min(D_, DEPTH)}, at::kFloat);
    for (int64_t d = 0; d < D_; d += DEPTH) {
      const int64_t depth = std::min(DEPTH, D_ - d);
      float* out = gathered.mutable_data_ptr<float>();
      for (int64_t i = begin; i < end; ++i, out += depth)
        rows::scale(row_[i] + d, factor_[i], out, depth);
      at::addmm_out(products, products,
                    gathered.narrow(0, 0, rows_here * depth).view({rows_here, depth}),
                    centroids.narrow(1, d, depth).t(), /*beta=*/d == 0 ? 0 : 1);
    }
    for (int64_t i = begin; i < end; ++i) settle_from_products(i);
  });
}

// bounds(i) holds f_i . c_k: choose the label of token i and leave lower bounds there
void Lloyd::settle_from_products(int64_t i) {
  using rows::Vec;
  float* s = bounds(i);
  if (!finite_[i]) {
    labels_[i] = 0;
    return;
  }
  // the nearest centroid minimises s_k = offset_k - f_i . c_k
  float least = INF;
  Vec least_lanes(INF);
  rows::each_vector(clusters_, [&](int64_t k, int64_t n) {
    const Vec v = rows::load(offset_.data() + k, n) - rows::load(s + k, n);
    rows::store(v, s + k, n);
    if (n == rows::W) {
      least_lanes = at::vec::minimum(least_lanes, v);
    } else {
      for (int64_t j = 0; j < n; ++j) least = std::min(least, s[k + j]);
    }
  });
  least = std::min(
      least, at::vec::vec_reduce_all<float>(
                 [](const Vec& a, const Vec& b) { return at::vec::minimum(a, b); }, least_lanes));

  const float error = product_error_ * (square_[i] + largest_square_) + tiny_;
  int64_t candidates = 0, label = 0;
  for_each_below(s, least + error, clusters_, [&](int64_t k) {
    if (candidates++ == 0) label = k;
  });
  if (candidates == 1) {
    own_[i] = NOT_KNOWN;
    const float square = square_[i] + centroid_square_[label] + 2 * (s[label] - offset_[label]);
    upper_[i] = std::sqrt(std::max(0.f, square) + error);
  } else {
    label = -1;
    for_each_below(s, least + error, clusters_, [&](int64_t k) {
      const float d = distance(i, k);
      if (label < 0 || d < own_[i]) {
        label = k;
        own_[i] = d;
      }
    });
    upper_[i] = upper(own_[i]);
  }
  labels_[i] = label;

  const Vec base(square_[i] - error), zero(0.f), two(2.f);
  rows::each_vector(clusters_, [&](int64_t k, int64_t n) {
    const Vec v = base + rows::load(centroid_square_.data() + k, n) +
                  two * (rows::load(s + k, n) - rows::load(offset_.data() + k, n));
    // NaN, from an overflow, is no bound at all: zero is
    rows::store(Vec::blendv(zero, v, v > zero).sqrt(), s + k, n);
  });
}

void Lloyd::assign_within_bounds() {
  if (!bounds_hold_ || !has_euclidean_form()) return assign_all();
  int64_t open = 0, sampled = 0;
  for (int64_t i = 0; i < tokens_; i += SAMPLING, ++sampled) open += tighten(i);
  if (open > DENSE_SHARE * sampled * clusters_) return assign_all();
  for_each_block(tokens_, D_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i % SAMPLING != 0) tighten(i);
      settle_within_bounds(i);
    }
  });
}

// lower the bounds of token i by what the centroids moved, compute the distance to its own centroid
// if that moved, and return how many pairs remain open
int64_t Lloyd::tighten(int64_t i) {
  using rows::Vec;
  if (!finite_[i]) return 0;
  float* lower_bounds = bounds(i);
  rows::each_vector(clusters_, [&](int64_t k, int64_t n) {
    const Vec v = rows::load(lower_bounds + k, n) - rows::load(moved_.data() + k, n);
    rows::store(Vec::blendv(Vec(0.f), v, v > Vec(0.f)), lower_bounds + k, n);
  });
  if (moved_[labels_[i]] > 0) {
    own_[i] = distance(i, labels_[i]);
    upper_[i] = upper(own_[i]);
  }
  int64_t open = 0;
  for_each_below(lower_bounds, upper_[i], clusters_, [&](int64_t) { ++open; });
  return open;
}

void Lloyd::settle_within_bounds(int64_t i) {
  if (!finite_[i]) {
    labels_[i] = 0;
    return;
  }
  const int32_t former = labels_[i];
  float* lower_bounds = bounds(i);
  float limit = upper_[i];
  // `limit` only shrinks, so a pair passed over once stays passed over
  for_each_below(lower_bounds, upper_[i], clusters_, [&](int64_t k) {
    if (k == former || lower_bounds[k] > limit) return;
    if (std::isnan(own_[i])) {
      own_[i] = distance(i, former);
      limit = upper(own_[i]);
      if (lower_bounds[k] > limit) return;
    }
    const float cut = limit * limit * ROOM;
    const float square = rows::squared_distance(row_[i], factor_[i], centroid(k), D_, cut);
    if (square > cut) {
      lower_bounds[k] = std::sqrt(std::max(0.f, square - tiny_)) * (1 - 1e-5f);
      return;
    }
    const float d = metric_ == Metric::euclidean ? square : distance(i, k);
    lower_bounds[k] = lower(d);
    if (d < own_[i] || (d == own_[i] && k < labels_[i])) {
      labels_[i] = k;
      own_[i] = d;
      limit = upper(d);
    }
  });
  upper_[i] = limit;
}

void Lloyd::repair() {
  sizes_.assign(clusters_, 0);
  for (int32_t label : labels_) ++sizes_[label];
  if (std::find(sizes_.begin(), sizes_.end(), 0) == sizes_.end()) return;
  for_each_block(tokens_, D_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) own_[i] = finite_[i] ? distance(i, labels_[i]) : INF;
  });
  for (int64_t k = 0; k < clusters_; ++k) {
    if (sizes_[k] > 0) continue;
    int64_t farthest = -1;
    for (int64_t i = 0; i < tokens_; ++i)
      if (sizes_[labels_[i]] >= 2 && (farthest < 0 || own_[i] > own_[farthest])) farthest = i;
    if (farthest < 0) break;
    --sizes_[labels_[farthest]];
    ++sizes_[k];
    labels_[farthest] = k;
    own_[farthest] = NOT_KNOWN;
    upper_[farthest] = INF;
  }
}

}  // namespace vmtc
