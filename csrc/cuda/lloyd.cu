#include <utility>

#include "lloyd.cuh"
#include "lloyd.h"

namespace vmtc::cuda {
namespace {

template <bool EUCLIDEAN, bool CLUSTER, bool SHARED_SUMS>
__device__ __forceinline__ void run(const ClusterArgs& args, const float* pairs, const float* norms,
                                    double* sums) {
  // no older GPU has clusters
  if constexpr (!CLUSTER || VMTC_DEVICE_CODE == 0 || VMTC_DEVICE_CODE >= 900) {
    Lloyd<EUCLIDEAN, CLUSTER, SHARED_SUMS> lloyd(args, pairs, norms, sums);
    if (lloyd.b < args.B) lloyd.run();
  } else {
    no_such_code();
  }
}

template <bool EUCLIDEAN>
__global__ void __launch_bounds__(FEW_THREADS, 1)
    cluster_kernel(ClusterArgs args, const float* pairs, const float* norms, double* sums) {
  run<EUCLIDEAN, true, true>(args, pairs, norms, sums);
}

template <bool EUCLIDEAN>
__global__ void __launch_bounds__(MANY_THREADS, 1)
    shared_sums_kernel(ClusterArgs args, const float* pairs, const float* norms, double* sums) {
  run<EUCLIDEAN, false, true>(args, pairs, norms, sums);
}

template <bool EUCLIDEAN>
__global__ void __launch_bounds__(FEW_THREADS, 1)
    global_sums_kernel(ClusterArgs args, const float* pairs, const float* norms, double* sums) {
  run<EUCLIDEAN, false, false>(args, pairs, norms, sums);
}

struct Form {
  int blocks;  // of a cluster
  bool shared_sums;
  int threads;
  size_t bytes;
};

// Clusters answer soonest, while there are multiprocessors for them: many images keep one block
// each busier. No result depends on the form.
Form form(int64_t B, int64_t C, int64_t K, int capability, int processors, size_t most_shared) {
  const auto of = [&](int blocks, bool shared_sums) {
    const bool cluster = blocks > 1;
    const int most = cluster || !shared_sums ? FEW_THREADS : MANY_THREADS;
    const int threads = C <= 128 ? most / 4 : most;
    const Layout layout(int(C), int(K), blocks, threads / WARP, shared_sums, cluster);
    return Form{blocks, shared_sums, threads, layout.bytes};
  };
  if (capability >= 90 && C >= 64)
    for (int waves : {1, 2})
      for (int blocks : {STRIPS, STRIPS / 2})
        if (B * blocks <= waves * processors && of(blocks, true).bytes <= most_shared)
          return of(blocks, true);
  return of(1, of(1, true).bytes <= most_shared);
}

template <bool EUCLIDEAN>
auto kernel_of(const Form& form) {
  return form.blocks > 1    ? cluster_kernel<EUCLIDEAN>
         : form.shared_sums ? shared_sums_kernel<EUCLIDEAN>
                            : global_sums_kernel<EUCLIDEAN>;
}

}  // namespace

bool lloyd_fits(int64_t C, int64_t K) {
  constexpr int64_t MOST = 1 << 14;
  return C < MOST && K < MOST &&
         Layout(int(C), int(K), 1, FEW_THREADS / WARP, false, false).bytes <= LEAST_SHARED_MEMORY;
}

int64_t lloyd_workspace(int64_t B, int64_t C, int64_t K) {
  return B * K * Layout(int(C), int(K), 1, 1, false, false).sum_stride;
}

cudaError_t lloyd(const ClusterArgs& args, const float* pairs, const float* norms, double* sums,
                  cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors))
    return error;
  const auto run_as = [&](int capability) -> std::pair<cudaError_t, int> {
    const Form chosen = form(args.B, args.C, args.K, capability, processors, most_shared_memory());
    const auto kernel =
        args.metric == Metric::euclidean ? kernel_of<true>(chosen) : kernel_of<false>(chosen);
    const Shape shape{grid_of(args.B * chosen.blocks), unsigned(chosen.threads), chosen.bytes,
                      stream, chosen.blocks};
    return {launch(kernel, shape, args, pairs, norms, sums), chosen.blocks};
  };
  const auto [error, blocks] = run_as(code_capability(cluster_kernel<false>));
  // a slice of a GPU may have no eight multiprocessors side by side
  return error && blocks > 1 ? run_as(0).first : error;
}

}  // namespace vmtc::cuda
