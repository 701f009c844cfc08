// The C interface of Millicent's CPU kernels. Plain pointers and plain structs, loaded with ctypes: nothing here depends
// on torch, Python or a C++ runtime's binary interface. One call runs at a time; each call uses the library's own threads.
#ifndef MILLICENT_KERNELS_H
#define MILLICENT_KERNELS_H

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define MK_EXPORT __attribute__((visibility("default")))

// Raised whenever a struct or a signature below changes; the Python side refuses a library that answers another number.
enum { MK_INTERFACE_VERSION = 4 };

// How a weight matrix is stored. Groups are 32 consecutive inputs of one output.
//   MK_Q8:   w = scale * (q - 128), q in 0..255           (GGUF Q8_0)
//   MK_Q4:   w = scale * (q - 8),   q in 0..15            (GGUF Q4_0)
//   MK_Q4_MIN: w = scale * q + min, q in 0..15            (GGUF Q4_1)
enum mk_format { MK_F32 = 0, MK_BF16 = 1, MK_Q8 = 2, MK_Q4 = 3, MK_Q4_MIN = 4 };

// What becomes of a linear's result. SILU_MUL expects gate and up rows interleaved 16 by 16 and halves the outputs.
enum mk_epilogue { MK_STORE = 0, MK_ADD = 1, MK_SILU_MUL = 2 };

// A packed matrix [outputs, inputs]; inputs is a multiple of 32. Outputs are stored in tiles of 64, the last one padded.
typedef struct mk_weight {
  int32_t format;
  int32_t reserved;
  int64_t outputs;
  int64_t inputs;
  const void* values;
  const uint16_t* scales;  // float16 [tile][group][64], quantized formats only
  const uint16_t* mins;    // the same, MK_Q4_MIN only
  const float* bias;       // [outputs] or null
} mk_weight;

// Which rows belong together. Piece p owns rows row_offsets[p] .. row_offsets[p+1]-1, which stand at the positions
// starts[p], starts[p]+1, ... of its sequence; its block table begins at tables + table_offsets[p].
typedef struct mk_batch {
  int64_t rows;
  int64_t pieces;
  const int32_t* row_offsets;
  const int32_t* starts;
  const int32_t* table_offsets;
  const int32_t* tables;
} mk_batch;

// What the layers of a decoder share. head_dim is a multiple of 16. cosines and sines are [positions][rotary_dims / 2].
typedef struct mk_shape {
  int32_t hidden;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t rotary_dims;
  int32_t rotary_interleaved;  // pairs (0,1), (2,3), ... instead of (0, half), (1, half+1), ...
  int32_t intermediate;
  int32_t block_tokens;
  int32_t cache_format;  // MK_BF16, MK_F32 or MK_Q8: signed bytes with a float scale per token and KV head
  float norm_epsilon;
  float attention_scale;
  int32_t reserved;
  const float* cosines;
  const float* sines;
} mk_shape;

typedef struct mk_layer {
  const float* attention_norm;    // [hidden]
  const float* feed_forward_norm; // [hidden]
  const float* query_norm;        // [head_dim] or null
  const float* key_norm;          // [head_dim] or null
  mk_weight qkv;                  // outputs (heads + 2 * kv_heads) * head_dim
  mk_weight output;
  mk_weight gate_up;              // 2 * intermediate, interleaved 16 by 16
  mk_weight down;
  void* keys;                     // this layer's cache, mk_cache_block_bytes per block
  void* values;
} mk_layer;

// How one token is drawn from a row of scores [columns]: temperature (0 takes the first of the greatest), top-k (0 is
// off), top-p, min-p, typical-p, in this order, each over what the one before left; ties with the last one kept are kept.
// number in [0, 1) is the place in the cumulative mass, in the order of the columns.
typedef struct mk_draw {
  const float* scores;
  double number;
  double temperature;
  double top_p;
  double min_p;
  double typical_p;
  int64_t top_k;
} mk_draw;

MK_EXPORT int32_t mk_interface_version(void);

// Instruction sets this library was built with and this processor has, best first, separated by commas.
MK_EXPORT const char* mk_instruction_sets(void);
// The one in use. mk_use_instruction_set answers 0, or -1 when the name is not among mk_instruction_sets.
MK_EXPORT const char* mk_instruction_set(void);
MK_EXPORT int32_t mk_use_instruction_set(const char* name);
// How many threads calls use, the caller's included. Answers the number in force (threads that can't start are gone
// without).
MK_EXPORT int32_t mk_use_threads(int32_t threads);

// Bytes of the packed values of a matrix. Scales and mins have mk_packed_scales entries each.
MK_EXPORT int64_t mk_packed_value_bytes(int32_t format, int64_t outputs, int64_t inputs);
MK_EXPORT int64_t mk_packed_scales(int64_t outputs, int64_t inputs);
// Asks the system for large pages behind memory that is read through once a step. Does nothing where there are none.
MK_EXPORT void mk_use_large_pages(void* memory, int64_t bytes);
// values: [outputs][inputs] of float, bf16 or uint8 q; scales, mins: float16 [outputs][inputs / 32].
MK_EXPORT void mk_pack(int32_t format, int64_t outputs, int64_t inputs, const void* values, const uint16_t* scales,
                       const uint16_t* mins, void* packed_values, uint16_t* packed_scales, uint16_t* packed_mins);
// Rows of a packed matrix as float32 [count][inputs]: embeddings from a tied head, and round trips in tests.
MK_EXPORT void mk_unpack_rows(const mk_weight* weight, const int64_t* rows, int64_t count, float* out);

// The functions below that answer int32_t answer 0, or -1 where memory ran out.

// y = x W^T (+ bias), x float32 [rows][inputs], y float32 [rows][outputs]. With norm, x is RMS-normalised first.
MK_EXPORT int32_t mk_linear(const mk_weight* weight, const float* x, int64_t rows, const float* norm, float norm_epsilon,
                            int32_t epilogue, float* y);

// Bytes of one block of one layer's keys; the values need as many.
MK_EXPORT int64_t mk_cache_block_bytes(const mk_shape* shape);
// Head norms (when given), rotary embedding of queries and keys, keys and values written to the cache.
// qkv: float32 [rows][(heads + 2 kv_heads) head_dim], its queries and keys are overwritten.
MK_EXPORT int32_t mk_rotate_and_write(const mk_shape* shape, const mk_layer* layer, const mk_batch* batch, float* qkv);
// Causal attention of the rotated queries in qkv over the cache. out: float32 [rows][heads * head_dim].
MK_EXPORT int32_t mk_attend(const mk_shape* shape, const mk_layer* layer, const mk_batch* batch, const float* qkv,
                            float* out);
// All layers of a decoder: hidden, float32 [rows][hidden], is updated in place; what it holds after -1 means nothing.
MK_EXPORT int32_t mk_decode_layers(const mk_shape* shape, const mk_layer* layers, int64_t count, const mk_batch* batch,
                                   float* hidden);

// One token for each draw, the same whatever comes with it; -1 where its scores are no distribution: one is NaN or
// infinitely great, or none is finite.
MK_EXPORT int32_t mk_sample(const mk_draw* draws, int64_t count, int64_t columns, int64_t* tokens);

// For each row of scores [columns] the ids of its `top` greatest, best[count][top], best first and of equals the first
// (-1 where there are no more); and in log_sums what is taken off its scores to make them log probabilities, NaN where
// they are no distribution.
MK_EXPORT int32_t mk_score(const float* const* rows, int64_t count, int64_t columns, int64_t top, int64_t* best,
                           double* log_sums);

#if defined(__cplusplus)
}
#endif
#endif
