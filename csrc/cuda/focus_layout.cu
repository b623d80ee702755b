#include "focus.cuh"

namespace vmtc::cuda {
namespace {

constexpr int WARPS = 32, THREADS = WARPS * WARP;

// Two counts below 2^16 in one word, of each warp: those of the warps before this one, and of all.
// counts: [2, WARPS] in shared memory, in turn, so that one barrier is enough.
struct Before {
  unsigned before, all;
  __device__ Before(unsigned* counts, int turn, unsigned mine) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    counts += turn % 2 * WARPS;
    if (lane == 0) counts[warp] = mine;
    __syncthreads();
    const unsigned other = counts[lane];
    before = warp_sum(lane < warp ? other : 0u);
    all = warp_sum(other);
  }
};

// one block a sequence
__global__ void __launch_bounds__(THREADS) layout_kernel(Layout layout) {
  unsigned* counts = shared_memory<unsigned>();  // [2, WARPS]
  const Sequence& sequence = layout.sequence;
  const int64_t b = block_index(), L = sequence.L, Lq = sequence.Lq;
  if (b >= sequence.B) return;
  const int thread = threadIdx.x, lane = thread % WARP;
  const uint32_t lower = lowest<uint32_t>(lane);
  const uint8_t* modality = sequence.modality + b * sequence.modality_batch_stride;
  int turn = 0, texts = 0, images = 0;
  const auto kind_of = [&](int64_t key) {
    return key < L ? modality[key * sequence.modality_stride] : uint8_t(0);
  };
  uint8_t next = kind_of(thread);
  for (int64_t base = 0; base < L; base += THREADS, ++turn) {
    const int64_t key = base + thread;
    const uint8_t kind = next;
    // under way while the others are counted
    next = kind_of(key + THREADS);
    const uint32_t text = __ballot_sync(ALL_LANES, kind == TEXT);
    const uint32_t image = __ballot_sync(ALL_LANES, kind == IMAGE);
    const Before found(counts, turn, __popc(text) | __popc(image) << 16);
    const int text_rank = texts + int(found.before & 0xffff);
    if (lane == 0 && key < L)
      layout.words[b * ceil_div(L, int64_t(32)) + key / 32] = {text, image, text_rank,
                                                               images + int(found.before >> 16)};
    if (layout.text_at && kind == TEXT)
      layout.text_at[b * L + text_rank + __popc(text & lower)] = int(key);
    texts += int(found.all & 0xffff);
    images += int(found.all >> 16);
  }
  if (!layout.rows) return;
  int rows = 0;
  for (int64_t base = 0; base < Lq; base += THREADS, ++turn) {
    const int64_t query = base + thread;
    const bool is_text = query < Lq && position_of(sequence, b, query, true) >= 0;
    const uint32_t text = __ballot_sync(ALL_LANES, is_text);
    const Before found(counts, turn, __popc(text));
    if (is_text) layout.rows[b * Lq + rows + int(found.before) + __popc(text & lower)] = int(query);
    rows += int(found.all);
  }
  if (thread == 0) layout.row_count[b] = rows;
}

}  // namespace

Layout carve_layout(Workspace& workspace, const Sequence& sequence, bool with_rows) {
  const int64_t B = sequence.B, L = sequence.L, Lq = sequence.Lq;
  Layout layout{};
  layout.sequence = sequence;
  layout.words = workspace.take<Keys32>(B * ceil_div(L, int64_t(32)));
  if (with_rows) {
    layout.text_at = workspace.take<int32_t>(B * L);
    layout.rows = workspace.take<int32_t>(B * Lq);
    layout.row_count = workspace.take<int32_t>(B);
  }
  return layout;
}

cudaError_t focus_layout(const Layout& layout, cudaStream_t stream) {
  if (layout.sequence.B == 0) return cudaSuccess;
  return launch(layout_kernel,
                {grid_of(layout.sequence.B), THREADS, 2 * WARPS * sizeof(unsigned), stream},
                layout);
}

}  // namespace vmtc::cuda
