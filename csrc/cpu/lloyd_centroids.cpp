// The clusters' side of Lloyd's algorithm: members, sums, centroids.
#include "lloyd.h"
#include "rows.h"

namespace vmtc {
namespace {

// a sum that saw a token come or leave whose squared norm exceeds its own by this factor has lost
// digits, and is made anew
constexpr float OUTLIER = 1e12;

}  // namespace

void Lloyd::seed() {
  for (int64_t k = 0; k < clusters_; ++k) {
    const int64_t rank = (2 * k + 1) * tokens_ / (2 * clusters_);
    rows::scale(row_[rank], factor_[rank], centroid(k), D_);
    note_centroid(k);
  }
}

// refresh what is derived from centroid k, for cosine after making it a unit vector
void Lloyd::note_centroid(int64_t k) {
  float* c = centroid(k);
  float square = rows::dot(c, c, D_);
  if (metric_ == Metric::cosine) {
    const bool unit = square > tiny_;
    rows::scale(c, unit ? 1.f / std::sqrt(square) : 0.f, c, D_);
    square = unit;
  }
  centroid_square_[k] = square;
  offset_[k] = metric_ == Metric::cosine ? 0 : square / 2;
}

void Lloyd::count_members() {
  std::vector<int32_t> next(clusters_);
  int32_t total = 0;
  for (int64_t k = 0; k < clusters_; ++k) {
    first_[k] = next[k] = total;
    total += sizes_[k];
  }
  for (int64_t i = 0; i < tokens_; ++i) members_[next[labels_[i]]++] = i;
}

// make sums_ those of labels_
void Lloyd::update_sums() {
  const bool anew = tokens_ == 0 || summed_[0] < 0;
  std::vector<std::vector<int32_t>> changes(clusters_);  // ranks of the tokens that came or left
  int64_t moved = 0;
  for (int64_t i = 0; i < tokens_; ++i) {
    if (labels_[i] == summed_[i]) continue;
    ++moved;
    changes[labels_[i]].push_back(i);
    if (!anew) changes[summed_[i]].push_back(i);
  }
  count_members();
  at::parallel_for(0, clusters_, grain(2 * moved * D_ / clusters_),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       changed_[k] = anew || !changes[k].empty();
                       if (changed_[k] && (anew || !sum_changes(k, changes[k]))) sum_members(k);
                     }
                   });
  summed_ = labels_;
}

void Lloyd::sum_members(int64_t k) {
  const int32_t* member = members(k);
  std::fill_n(sum(k), D_, 0.);
  finite_members_[k] = 0;
  largest_[k] = 0;
  for (int32_t j = 0; j < sizes_[k]; ++j) finite_members_[k] += finite_[member[j]];
  rows::add_rows(
      sizes_[k], [&](int64_t j) { return row_[member[j]]; },
      [&](int64_t j) { return factor_[member[j]]; }, sum(k), D_);
}

// add what came to cluster k and take away what left; false if that lost digits
bool Lloyd::sum_changes(int64_t k, const std::vector<int32_t>& changes) {
  const auto left = [&](int32_t i) { return summed_[i] == k; };
  rows::add_rows(
      changes.size(), [&](int64_t j) { return row_[changes[j]]; },
      [&](int64_t j) { return left(changes[j]) ? -factor_[changes[j]] : factor_[changes[j]]; },
      sum(k), D_);
  for (int32_t i : changes) {
    finite_members_[k] += left(i) ? -finite_[i] : finite_[i];
    largest_[k] = std::max(largest_[k], square_[i]);
  }
  double square = 0;
  for (int64_t d = 0; d < D_; ++d) square += sum(k)[d] * sum(k)[d];
  return finite_members_[k] > 0 && largest_[k] <= OUTLIER * square;
}

// centroids of the clusters whose sums changed, and how far each moved
void Lloyd::move_centroids() {
  at::parallel_for(0, clusters_, grain(4 * D_), [&](int64_t begin, int64_t end) {
    std::vector<float> former(D_);
    for (int64_t k = begin; k < end; ++k) {
      moved_[k] = 0;
      if (!changed_[k]) continue;
      float* c = centroid(k);
      const double count = std::max(finite_members_[k], 1);
      for (int64_t d = 0; d < D_; ++d) {
        former[d] = c[d];
        c[d] = sum(k)[d] / count;
      }
      note_centroid(k);
      moved_[k] =
          std::sqrt(rows::squared_distance(former.data(), 1.f, c, D_) + tiny_) * (1 + 1e-5f);
    }
  });
}

void Lloyd::means(float* out) {
  update_sums();
  at::parallel_for(0, clusters_, grain(D_), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const double count = std::max(finite_members_[k], 1);
      for (int64_t d = 0; d < D_; ++d) out[k * D_ + d] = sum(k)[d] / count;
    }
  });
}

}  // namespace vmtc
