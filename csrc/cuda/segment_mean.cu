#include "segment_mean.h"
#include "segment_sum.cuh"

namespace vmtc::cuda {
namespace {

template <typename T, bool PACKED>
__global__ void __launch_bounds__(SegmentSum<T>::THREADS)
    mean_kernel(SegmentMeanArgs args, int64_t slices) {
  using Sum = SegmentSum<T>;
  auto& shared = *shared_memory<typename Sum::Shared>();
  const int64_t job = block_index();
  if (job >= args.B * args.K * slices) return;
  const int64_t slice = job % slices, b = job / slices / args.K, k = job / slices % args.K;
  const int32_t* offsets = args.offsets + b * (args.K + 1) + k;
  const int begin = offsets[0], count = offsets[1] - begin;
  const int32_t* members = args.members + b * args.C + begin;

  int counting = 0;
  const auto member = [&](int j) -> WeightedRow {
    const int rank = members[j], position = args.rows[b * args.N + rank];
    const float scale = args.scale[b * args.C + rank];
    if (args.labels && slice == 0) args.labels[b * args.N + position] = int(k);
    counting += scale >= 0;
    // 0 times what is not finite would be NaN
    return {scale > 0 ? position * args.x.row_stride : -1, scale};
  };
  TwoFloats sum[Sum::EACH];
  Sum::template run<PACKED>(shared, static_cast<const T*>(args.x.data) + b * args.x.image_stride,
                            args.D, slice * Sum::WIDTH, count, member, sum);
  const int total = int(Sum::total(shared, counting));
  if (threadIdx.x >= WARP) return;
  Sum::template store<PACKED>(args.means + (b * args.K + k) * args.D, args.D, slice * Sum::WIDTH,
                              [&](int e) { return total ? sum[e].divided_by(total) : 0.f; });
}

}  // namespace

cudaError_t segment_mean(const SegmentMeanArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.K == 0) return cudaSuccess;
  const bool packed = in_packs(args.x, args.D) &&
                      in_packs({args.means, args.K * args.D, args.D, Dtype::float32}, args.D);
  return with_type(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = SegmentSum<T>;
    const int64_t slices = ceil_div(args.D, int64_t(Sum::WIDTH));
    return launch(
        packed ? mean_kernel<T, true> : mean_kernel<T, false>,
        {grid_of(args.B * args.K * slices), Sum::THREADS, sizeof(typename Sum::Shared), stream},
        args, slices);
  });
}

}  // namespace vmtc::cuda
