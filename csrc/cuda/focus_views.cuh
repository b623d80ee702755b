// Which keys the rows of a block take: those that are visible and not inhibited.
#pragma once

#include "focus.cuh"
#include "focus_tile.cuh"
#include "masked_attention.h"

namespace vmtc::cuda {

// count bits of a row of the mask from bit `first` on; those behind its end are 0
template <typename Bits>
__device__ __forceinline__ Bits window(const int32_t* words, int64_t W, int first) {
  const auto word = [&](int i) { return i < W ? Bits(uint32_t(words[i])) : Bits(0); };
  const int i = first / 32, shift = first % 32;
  if constexpr (sizeof(Bits) == 8) {
    const Bits bits = (word(i) | word(i + 1) << 32) >> shift;
    return shift ? bits | word(i + 2) << (64 - shift) : bits;
  } else {
    const Bits bits = word(i) >> shift;
    return shift ? bits | word(i + 1) << (32 - shift) : bits;
  }
}

// the lowest bits of `bits`, one after the other, to the places that are set
template <typename Bits>
__device__ __forceinline__ Bits spread(Bits bits, Bits places) {
  const Bits lowest_place = places & (~places + 1);
  // no gap between the places
  if (((places + lowest_place) & places) == 0) return bits * lowest_place & places;
  Bits result = 0;
  for (; places; places &= places - 1, bits >>= 1)
    if (bits & 1) result |= places & (~places + 1);
  return result;
}

template <typename Bits>
__device__ __forceinline__ Bits warp_or(Bits bits) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(ALL_LANES, bits, step);
  return bits;
}

// What the rows of a block see of one tile of keys.
template <typename Bits>
struct View {
  int tile;
  Bits keys;       // that any row of the block takes
  Bits seen, low;  // of row lane % 16 of the warp: keys that it takes; those of reduced weight
  bool mine;       // a row of this warp takes any
  bool plain;      // all rows of this warp take all, none reduced
};

template <typename T, int D>
class Views {
  using Tile = FocusTile<T, D>;
  using Keys = KeyTile<Tile::KEYS>;

 public:
  using Bits = typename Keys::Bits;

  // unions: [2, WARPS] in shared memory
  __device__ Views(const MaskedAttentionArgs& args, Bits* unions, int64_t b, int64_t group,
                   int64_t first_row, int64_t rows)
      : args_(args), unions_(unions), b_(b), position_(-1), mask_(nullptr) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t share = args.H / args.G, row = first_row + warp * 16 + lane % 16;
    if (row < rows) {
      const int64_t query = row / share, head = group * share + row % share;
      position_ = position_of(args.layout.sequence, b, query);
      mask_ = args.mask + b * args.mask_batch_stride + head * args.mask_head_stride +
              query * args.mask_row_stride;
    }
    const int last = warp_max(position_);
    int* each = reinterpret_cast<int*>(unions);
    if (lane == 0) each[warp] = last;
    bool any = false;
    if (args.penalty != 0.f) {
      const int32_t* before = nullptr;
#pragma unroll 1
      for (int r = 0; r < 16; ++r) {
        const auto shown = __shfl_sync(ALL_LANES, reinterpret_cast<unsigned long long>(mask_), r);
        const int32_t* words = reinterpret_cast<const int32_t*>(shown);
        if (!words || words == before) continue;
        before = words;
        for (int64_t w = lane; w < args.W; w += WARP) any |= words[w] != 0;
      }
    }
    any_low_ = __syncthreads_or(any);
    last_ = -1;
#pragma unroll
    for (int w = 0; w < Tile::WARPS; ++w) last_ = max(last_, each[w]);
    __syncthreads();
  }

  // the last key that any row of the block sees, -1 if none
  __device__ int last() const { return last_; }
  __device__ int position(int i) const {
    return __shfl_sync(ALL_LANES, position_, threadIdx.x % WARP / 4 + 8 * i);
  }

  // the first tile from `tile` on of which any key is taken; tile `end` if there is none
  __device__ View<Bits> find(int tile, int end) {
    View<Bits> view{};
    for (view.tile = tile; view.tile < end; ++view.tile) {
      look(view);
      if (view.keys) break;
    }
    return view;
  }

 private:
  __device__ __forceinline__ void look(View<Bits>& view) {
    const Keys keys(args_.layout, b_, view.tile);
    const int first = view.tile * Tile::KEYS;
    view.seen = keys.real() & lowest<Bits>(position_ - first + 1);
    view.low = 0;
    if (any_low_ && keys.image && view.seen)
      view.low =
          spread<Bits>(window<Bits>(mask_, args_.W, keys.first_image), keys.image) & view.seen;
    if (args_.penalty == -INFINITY) {
      view.seen &= ~view.low;
      view.low = 0;
    }
    if (any_low_) {
      const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
      const Bits mine = warp_or(view.seen);
      view.mine = mine != 0;
      // two in turn: another warp may still read those of the tile before
      Bits* unions = unions_ + turn_ * Tile::WARPS;
      turn_ ^= 1;
      if (lane == 0) unions[warp] = mine;
      __syncthreads();
      view.keys = 0;
#pragma unroll
      for (int w = 0; w < Tile::WARPS; ++w) view.keys |= unions[w];
    } else {
      view.keys = keys.real() & lowest<Bits>(last_ - first + 1);
      view.mine = __any_sync(ALL_LANES, view.seen != 0);
    }
    // rows of padding may take anything: they are not written
    view.plain = __all_sync(ALL_LANES, position_ < 0 || (view.seen == Keys::ALL && view.low == 0));
  }

  const MaskedAttentionArgs& args_;
  Bits* unions_;
  int64_t b_;
  int position_, last_, turn_ = 0;
  const int32_t* mask_;
  bool any_low_;
};

}  // namespace vmtc::cuda
