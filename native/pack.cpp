// Weights into the order in which the kernels read them, and back. Every instruction set reads the same order:
// tiles of 64 outputs, in which 4 bytes of each of 16 outputs lie side by side.
//   float     [tile][input][64]              bfloat16  [tile][input / 2][64][2]
//   8 bits    [tile][group][4 subtiles][8 steps][16 outputs][4 inputs]
//   4 bits    [tile][group][4 subtiles][4 steps][16 outputs][4 bytes], inputs 0..3 of a step's 8 in the low nibbles
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "internal.h"

namespace millicent {
namespace {

struct Place {
  int64_t byte;
  int shift;  // of a nibble
};

Place place(int32_t format, int64_t inputs, int64_t output, int64_t input) {
  const int64_t lane = output % kTile;
  const int64_t tile = output / kTile * tile_bytes(format, inputs);
  if (format == MK_F32) return {tile + (input * kTile + lane) * 4, 0};
  if (format == MK_BF16) return {tile + ((input / 2 * kTile + lane) * 2 + input % 2) * 2, 0};
  const int steps = format == MK_Q8 ? 8 : 4;
  const int64_t step_inputs = kGroup / steps;
  const int64_t subtile = (input / kGroup * (kTile / kSubtile) + lane / kSubtile) * steps;
  const int64_t at = tile + ((subtile + input % kGroup / step_inputs) * kSubtile + lane % kSubtile) * 4 + input % 4;
  return {at, input % step_inputs >= 4 ? 4 : 0};
}

int64_t scale_place(int64_t inputs, int64_t output, int64_t group) {
  return (output / kTile * (inputs / kGroup) + group) * kTile + output % kTile;
}

float from_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const float mantissa = static_cast<float>(bits & 1023);
  const float magnitude = exponent == 0    ? mantissa * 0x1p-24F
                          : exponent == 31 ? (mantissa == 0.0F ? __builtin_inff() : __builtin_nanf(""))
                                           : __builtin_ldexpf(1.0F + mantissa * 0x1p-10F, exponent - 15);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

float weight_at(const mk_weight& weight, int64_t output, int64_t input) {
  const Place at = place(weight.format, weight.inputs, output, input);
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.values) + at.byte;
  if (weight.format == MK_F32) {
    float value;
    std::memcpy(&value, bytes, 4);
    return value;
  }
  if (weight.format == MK_BF16) {
    uint16_t value;
    std::memcpy(&value, bytes, 2);
    return from_bfloat(value);
  }
  const int64_t group = scale_place(weight.inputs, output, input / kGroup);
  const float scale = from_float16(weight.scales[group]);
  if (weight.format == MK_Q8) return scale * static_cast<float>(*bytes - 128);
  const int q = (*bytes >> at.shift) & 15;
  if (weight.format == MK_Q4) return scale * static_cast<float>(q - 8);
  return scale * static_cast<float>(q) + from_float16(weight.mins[group]);
}

}  // namespace
}  // namespace millicent

using namespace millicent;

extern "C" {

int64_t mk_packed_value_bytes(int32_t format, int64_t outputs, int64_t inputs) {
  return divide_up(outputs, kTile) * tile_bytes(format, inputs);
}

int64_t mk_packed_scales(int64_t outputs, int64_t inputs) { return divide_up(outputs, kTile) * kTile * (inputs / kGroup); }

void mk_use_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2U << 20;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void mk_pack(int32_t format, int64_t outputs, int64_t inputs, const void* values, const uint16_t* scales,
             const uint16_t* mins, void* packed_values, uint16_t* packed_scales, uint16_t* packed_mins) {
  uint8_t* packed = static_cast<uint8_t*>(packed_values);
  std::memset(packed, 0, static_cast<size_t>(mk_packed_value_bytes(format, outputs, inputs)));
  const int64_t groups = inputs / kGroup;
  if (is_quantized(format)) {
    const size_t bytes = static_cast<size_t>(mk_packed_scales(outputs, inputs)) * 2;
    std::memset(packed_scales, 0, bytes);
    if (format == MK_Q4_MIN) std::memset(packed_mins, 0, bytes);
  }
  const size_t element = is_quantized(format) ? 1 : static_cast<size_t>(value_bits(format)) / 8;
  const uint8_t* from = static_cast<const uint8_t*>(values);
  for (int64_t output = 0; output < outputs; output++) {
    for (int64_t input = 0; input < inputs; input++, from += element) {
      const Place at = place(format, inputs, output, input);
      if (is_quantized(format)) {
        packed[at.byte] = static_cast<uint8_t>(packed[at.byte] | (*from << at.shift));
      } else {
        std::memcpy(packed + at.byte, from, element);
      }
    }
    for (int64_t group = 0; is_quantized(format) && group < groups; group++) {
      packed_scales[scale_place(inputs, output, group)] = scales[output * groups + group];
      if (format == MK_Q4_MIN) packed_mins[scale_place(inputs, output, group)] = mins[output * groups + group];
    }
  }
}

void mk_unpack_rows(const mk_weight* weight, const int64_t* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    for (int64_t input = 0; input < weight->inputs; input++) {
      out[i * weight->inputs + input] = weight_at(*weight, rows[i], input);
    }
  }
}

int64_t mk_cache_block_bytes(const mk_shape* shape) {
  return CacheGeometry(*shape).block_bytes;
}

}  // extern "C"
