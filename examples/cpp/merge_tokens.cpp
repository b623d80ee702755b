// merge_tokens without torch: 576 tokens of each image become 160. Checks what it got and says so.
#include "cuda/merge_tokens.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// device memory with a copy on the host
template <typename T>
struct Array {
  std::vector<T> host;
  T* device = nullptr;

  explicit Array(size_t size) : host(size) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), size * sizeof(T)));
  }
  ~Array() { cudaFree(device); }
  void to_device() {
    check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  void to_host() {
    check(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }
};

}  // namespace

int main() {
  using namespace vmtc::cuda;
  constexpr int64_t B = 2, N = 576, D = 64, P = 128, K = 32, SLOTS = P + K;

  Array<float> x(B * N * D), scores(B * N), tokens(B * SLOTS * D);
  Array<int32_t> owner(B * N), sizes(B * SLOTS);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& value : x.host) value = normal(random);
  for (float& value : scores.host) value = std::exp(normal(random));
  x.to_device();
  scores.to_device();

  MergeTokensArgs args{};
  args.x = args.features = {x.device, N * D, D, Dtype::float32};
  args.scores = scores.device;
  args.score_image_stride = N, args.score_stride = 1;
  args.score_dtype = Dtype::float32;
  args.B = B, args.N = N, args.D = D, args.Df = D, args.P = P, args.K = K;
  args.iterations = 10;
  args.metric = Metric::cosine;
  args.by_score = true;
  args.tokens = tokens.device;
  args.owner = owner.device;
  args.sizes = sizes.device;
  Array<unsigned char> workspace(merge_tokens_workspace(args));
  args.workspace = workspace.device;

  cudaStream_t stream = nullptr;
  check(merge_tokens(args, stream));
  check(cudaStreamSynchronize(stream));
  tokens.to_host();
  owner.to_host();
  sizes.to_host();

  // every slot is the mean of its tokens, weighted by their scores
  double worst = 0;
  int64_t counted = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t slot = 0; slot < SLOTS; ++slot) {
      std::vector<double> sum(D);
      double total = 0;
      int count = 0;
      for (int64_t i = 0; i < N; ++i) {
        if (owner.host[b * N + i] != slot) continue;
        const double weight = scores.host[b * N + i];
        for (int64_t d = 0; d < D; ++d) sum[d] += weight * x.host[(b * N + i) * D + d];
        total += weight;
        ++count;
      }
      if (count != sizes.host[b * SLOTS + slot] || count == 0) {
        std::fprintf(stderr, "slot %lld holds %d tokens, not %d\n", static_cast<long long>(slot),
                     count, sizes.host[b * SLOTS + slot]);
        return 1;
      }
      counted += count;
      for (int64_t d = 0; d < D; ++d)
        worst =
            std::fmax(worst, std::fabs(sum[d] / total - tokens.host[(b * SLOTS + slot) * D + d]));
    }
  std::printf("%lld tokens in %lld slots, largest error %.1e\n", static_cast<long long>(counted),
              static_cast<long long>(B * SLOTS), worst);
  return counted == B * N && worst < 1e-5 ? 0 : 1;
}
