// What is text and what is image in a sequence, and where its queries stand.
#pragma once

#include "types.h"

namespace vmtc::cuda {

// modality: 1 text, 2 image, all else is padding
struct Sequence {
  const uint8_t* modality;  // [B, L]
  int64_t modality_batch_stride, modality_stride;
  const int32_t* positions;  // [B, Lq], of each query; null for the last Lq of the L
  int64_t positions_batch_stride, positions_stride;
  int64_t B, L, Lq;
};

// 32 keys that begin at a multiple of 32, a bit each; how many there are of either kind before them
struct Keys32 {
  uint32_t text, image;
  int32_t texts_before, images_before;
};

// Found once for all heads; the memory is the caller's.
struct Layout {
  Sequence sequence;
  Keys32* words;  // [B, ceil(L / 32)]
  // where scores are computed, else null
  int32_t* text_at;    // [B, L]: the positions of the text, ascending
  int32_t* rows;       // [B, Lq]: the queries that are text, ascending
  int32_t* row_count;  // [B]: how many
};

Layout carve_layout(Workspace& workspace, const Sequence& sequence, bool with_rows);

// fills what the layout points to
cudaError_t focus_layout(const Layout& layout, cudaStream_t stream);

}  // namespace vmtc::cuda
