// What the instruction-set-independent part (decoder.cpp, dispatch.cpp) and the kernels (kernels.h) say to each other.
#ifndef MILLICENT_KERNELS_INTERNAL_H
#define MILLICENT_KERNELS_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "millicent_kernels.h"

namespace millicent {

constexpr int kTile = 64;           // outputs of a weight tile
constexpr int kSubtile = 16;        // outputs whose bytes lie together in a tile
constexpr int kGroup = 32;          // inputs that share a scale
constexpr int kCacheTile = 16;      // tokens of a cache tile
constexpr int kMaxHeadDim = 256;
constexpr int kAttentionRows = 96;  // query rows an attention task carries

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline bool is_quantized(int32_t format) { return format >= MK_Q8; }
inline int32_t value_bits(int32_t format) {
  switch (format) {
    case MK_F32: return 32;
    case MK_BF16: return 16;
    case MK_Q8: return 8;
    default: return 4;
  }
}
inline int64_t tile_bytes(int32_t format, int64_t inputs) { return kTile * inputs * value_bits(format) / 8; }

// Formats without scales or mins leave those pointers null.
template <typename T>
inline T* advance(T* pointer, int64_t by) {
  return pointer == nullptr ? nullptr : pointer + by;
}

inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}
inline float from_bfloat(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

// Activations of a linear, in the form the weight's format multiplies with, in panels of at most panel_rows rows.
// Within a panel of R rows: int8 [group][R][32], bfloat16 [input / 2][R][2] or float [input][R].
struct Panels {
  int32_t format;
  int64_t rows;
  int64_t inputs;
  int64_t count;
  void* values;
  float* scales;     // [group][R]: x = scale * q
  int32_t* initial;  // [group][R]: corrects the dot product for the weights' offset
  float* sums;       // [group][R]: sum of x over the group, MK_Q4_MIN only

  // Rows are spread evenly over the panels, so that none is left with a lone row.
  int64_t first_row(int64_t panel) const { return rows * panel / count; }
};

struct AttentionTask {
  const mk_shape* shape;
  const void* keys;
  const void* values;
  const float* qkv;
  float* out;
  const int32_t* table;   // of this piece's sequence
  int64_t piece_row;      // first row of the piece
  int64_t piece_start;    // and its position
  int64_t first_token;    // tokens of the piece this task answers for
  int64_t last_token;
  int32_t kv_head;
};

struct WriteTask {
  const mk_shape* shape;
  const float* query_norm;
  const float* key_norm;
  void* keys;
  void* values;
  float* qkv;            // of this row
  const int32_t* table;
  int64_t position;
  bool last_of_piece;
};

// One instruction set's kernels. A row's result is the same bits whatever other rows come with it.
struct Kernels {
  const char* name;
  int32_t panel_rows;
  void (*fill_panel)(const Panels& panels, int64_t panel, const float* x, const float* norm, float epsilon);
  void (*linear_tile)(const mk_weight& weight, const Panels& panels, int64_t tile, int64_t first_panel,
                      int64_t last_panel, int32_t epilogue, float* y);
  void (*rotate_and_write)(const WriteTask& task);
  void (*attend)(const AttentionTask& task);
  // One row's token, -1 where its scores are no distribution. The scratch is as long as the first says.
  int64_t (*sample_scratch_bytes)(int64_t columns);
  int64_t (*sample_row)(const mk_draw& draw, int64_t columns, void* scratch);
  double (*score_row)(const float* scores, int64_t columns, int64_t top, int64_t* best, void* scratch);
};

// Null where the library was built without that instruction set.
extern const Kernels* const kPortableKernels;
extern const Kernels* const kAvx2Kernels;
extern const Kernels* const kAvx512Kernels;
extern const Kernels* const kAvx512Bf16Kernels;
extern const Kernels* const kNeonKernels;

const Kernels& kernels_in_use();

// Where a position lies in a paged cache, in bytes: a block, and a tile and lane within it.
struct CacheGeometry {
  int64_t tiles_per_block;
  int64_t value_bytes;  // of one KV head's tile; behind them lie a quantized tile's scales
  int64_t tile_bytes;
  int64_t block_bytes;
  int32_t block_tokens;

  explicit CacheGeometry(const mk_shape& shape)
      : tiles_per_block(divide_up(shape.block_tokens, kCacheTile)),
        value_bytes(static_cast<int64_t>(kCacheTile) * shape.head_dim * value_bits(shape.cache_format) / 8),
        tile_bytes(value_bytes + (is_quantized(shape.cache_format) ? kCacheTile * 4 : 0)),
        block_bytes(tiles_per_block * tile_bytes * shape.kv_heads),
        block_tokens(shape.block_tokens) {}
  int64_t tile_offset(int64_t block, int64_t kv_head, int64_t tile) const {
    return block * block_bytes + (kv_head * tiles_per_block + tile) * tile_bytes;
  }
};

}  // namespace millicent
#endif
