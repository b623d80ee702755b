// How kernels read a layout of focus.h.
#pragma once

#include "common.cuh"
#include "focus.h"

namespace vmtc::cuda {

constexpr uint8_t TEXT = 1, IMAGE = 2;

// the position of a query, -1 where it is padding or stands outside of the sequence
__device__ __forceinline__ int position_of(const Sequence& sequence, int64_t b, int64_t query,
                                           bool text_alone = false) {
  const int64_t position =
      sequence.positions
          ? sequence
                .positions[b * sequence.positions_batch_stride + query * sequence.positions_stride]
          : sequence.L - sequence.Lq + query;
  if (position < 0 || position >= sequence.L) return -1;
  const uint8_t kind =
      sequence.modality[b * sequence.modality_batch_stride + position * sequence.modality_stride];
  return kind == TEXT || (kind == IMAGE && !text_alone) ? int(position) : -1;
}

// the lowest `count` bits, of any count
template <typename Bits>
__device__ __forceinline__ Bits lowest(int count) {
  constexpr int SIZE = 8 * sizeof(Bits);
  return count <= 0 ? Bits(0) : count >= SIZE ? ~Bits(0) : (Bits(1) << count) - 1;
}

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ int count_bits(uint64_t bits) { return __popcll(bits); }

// how many image tokens stand at a position or before it
__device__ __forceinline__ int images_until(const Layout& layout, int64_t b, int position) {
  const Keys32 word = layout.words[b * ceil_div(layout.sequence.L, int64_t(32)) + position / 32];
  return word.images_before + __popc(word.image & lowest<uint32_t>(position % 32 + 1));
}

// the same of text
__device__ __forceinline__ int texts_until(const Layout& layout, int64_t b, int position) {
  const Keys32 word = layout.words[b * ceil_div(layout.sequence.L, int64_t(32)) + position / 32];
  return word.texts_before + __popc(word.text & lowest<uint32_t>(position % 32 + 1));
}

// Of KEYS keys that begin at a multiple of KEYS, a bit each.
template <int KEYS>
struct KeyTile {
  using Bits = std::conditional_t<KEYS == 64, uint64_t, uint32_t>;
  static constexpr Bits ALL = ~Bits(0) >> (8 * sizeof(Bits) - KEYS);
  Bits text, image;
  int first_text, first_image;  // ranks of the first of either kind

  __device__ KeyTile(const Layout& layout, int64_t b, int tile) {
    const int count = int(ceil_div(layout.sequence.L, int64_t(32)));
    const Keys32* words = layout.words + int64_t(b) * count;
    if constexpr (KEYS == 64) {
      const Keys32 low = words[2 * tile];
      text = low.text, image = low.image;
      first_text = low.texts_before, first_image = low.images_before;
      if (2 * tile + 1 < count) {
        const Keys32 high = words[2 * tile + 1];
        text |= Bits(high.text) << 32, image |= Bits(high.image) << 32;
      }
    } else {
      constexpr int SHARE = 32 / KEYS;
      const Keys32 word = words[tile / SHARE];
      const int shift = tile % SHARE * KEYS;
      text = word.text >> shift & ALL, image = word.image >> shift & ALL;
      first_text = word.texts_before + __popc(word.text & lowest<uint32_t>(shift));
      first_image = word.images_before + __popc(word.image & lowest<uint32_t>(shift));
    }
  }

  __device__ Bits real() const { return text | image; }
};

}  // namespace vmtc::cuda
