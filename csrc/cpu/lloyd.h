// Lloyd's algorithm on the tokens of one image: shared by kmeans and merge_tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"

namespace vmtc {

// Exact k-means that avoids most of its arithmetic and most passes over the tokens. A GEMM gives
// every distance with a known error; what the error leaves undecided is computed directly, so
// labels follow the definition and do not depend on how the GEMM rounds. Afterwards each (token,
// centroid) pair carries a lower bound of its distance, lowered by how far the centroid moved
// (Elkan 2003, "Using the triangle inequality to accelerate k-means"); only pairs whose bound is
// below the token's own distance are computed. Sums of clusters are kept, and follow the tokens
// that change cluster.
class Lloyd {
 public:
  // bytes of workspace for images of at most so many tokens
  static int64_t workspace_size(int64_t tokens, int64_t clusters, int64_t D, at::ScalarType dtype);

  // workspace holds workspace_size bytes and outlives this
  Lloyd(int64_t tokens, int64_t clusters, int64_t D, Metric metric, void* workspace);

  // take the tokens at these positions of one image of x [B, N, D], unit stride in D; float32 is
  // read in place, so x must outlive this
  void load(const at::Tensor& x, int64_t image, const std::vector<int32_t>& positions);
  void run(int64_t iterations);
  // out = centroids under the labels that run left, [clusters, D]
  void means(float* out);

  const std::vector<int32_t>& labels() const { return labels_; }
  // tokens of each cluster
  const std::vector<int32_t>& sizes() const { return sizes_; }
  // ranks of the tokens of cluster k, ascending; sizes()[k] of them
  const int32_t* members(int64_t k) const { return members_.data() + first_[k]; }

 private:
  void assign_all();
  void assign_within_bounds();
  int64_t tighten(int64_t i);
  void settle_from_products(int64_t i);
  void settle_within_bounds(int64_t i);
  void repair();

  // lloyd_centroids.cpp
  void seed();
  void count_members();
  void update_sums();
  void sum_members(int64_t k);
  bool sum_changes(int64_t k, const std::vector<int32_t>& changes);
  void move_centroids();
  void note_centroid(int64_t k);

  bool has_euclidean_form() const;
  float* centroid(int64_t k) { return centroids_ + k * D_; }
  double* sum(int64_t k) { return sums_ + k * D_; }
  float* bounds(int64_t i) { return bounds_ + i * clusters_; }
  float distance(int64_t i, int64_t k);
  float upper(float distance) const;
  float lower(float distance) const;

  const int64_t tokens_, clusters_, D_;
  const Metric metric_;
  // what the sum of D squares may lose where they fall below the normal range of float32
  const float tiny_;
  double* const sums_;      // [clusters, D] of the finite members' features
  float* const centroids_;  // [clusters, D], unit vectors for cosine
  float* const bounds_;     // [tokens, clusters] lower bounds of Euclidean distances
  float* const zeros_;      // [D]
  float* const copy_;       // [tokens, D] where the input is not float32

  // the feature of token i is factor_[i] row_[i]
  std::vector<const float*> row_;
  std::vector<float> factor_;
  std::vector<float> square_;             // squared norm of the feature
  std::vector<uint8_t> finite_;           // tokens that are not have a zero feature here
  std::vector<float> own_;                // computed distance to the own centroid, NaN if unknown
  std::vector<float> upper_;              // upper bound of the Euclidean distance to it
  std::vector<int32_t> labels_, summed_;  // now, and as sums_ has them: a round ago
  std::vector<int32_t> sizes_, first_, members_;

  std::vector<int32_t> finite_members_;  // of each cluster, as sums_ has them
  std::vector<float> largest_;  // largest squared norm that came or left since the sum was made
  std::vector<float> centroid_square_, offset_;  // |c|^2; |c|^2 / 2, or 0 for cosine
  std::vector<float> moved_;                     // how far the centroid moved at most
  std::vector<uint8_t> changed_;                 // whether its sum changed
  float largest_square_ = 0, product_error_ = 0;
  bool bounds_hold_ = false;  // false where a zero centroid makes cosine no Euclidean distance
};

}  // namespace vmtc
