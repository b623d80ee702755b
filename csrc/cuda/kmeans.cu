#include "direct.h"
#include "kmeans.h"
#include "lloyd.h"
#include "pairs.h"

namespace vmtc::cuda {
namespace {

// beyond it the pairs of an image are more than its tokens
constexpr int64_t MOST_TOKENS = 1024;

// by sizes alone, so that an image is treated alike in every batch and on every GPU
bool by_pairs(const ClusterArgs& args) {
  return args.C <= MOST_TOKENS && lloyd_fits(args.C, args.K);
}

struct Memory {
  float *pairs, *norms;
  double* sums;

  Memory(const ClusterArgs& args, Workspace& workspace)
      : pairs(workspace.take<float>(args.B * args.C * pairs_stride(args.C))),
        norms(workspace.take<float>(args.B * args.C)),
        sums(workspace.take<double>(lloyd_workspace(args.B, args.C, args.K))) {}
};

}  // namespace

size_t cluster_workspace(const ClusterArgs& args) {
  if (!by_pairs(args)) return direct_workspace(args);
  Workspace workspace;
  Memory(args, workspace);
  return workspace.bytes();
}

cudaError_t cluster(const ClusterArgs& args, cudaStream_t stream) {
  if (args.B == 0 || args.K == 0) return cudaSuccess;
  if (!by_pairs(args)) return direct(args, stream);
  Workspace workspace(args.workspace);
  const Memory memory(args, workspace);
  const PairsArgs of{args.x,      args.B,    args.N,      args.D,       args.C,
                     args.metric, args.rows, args.counts, memory.pairs, memory.norms};
  if (const cudaError_t error = pairs(of, stream)) return error;
  return lloyd(args, memory.pairs, memory.norms, memory.sums, stream);
}

}  // namespace vmtc::cuda
