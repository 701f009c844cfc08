// The vocabulary in which the kernels are written, as four lanes of the compiler's vector types, for any processor.
// The other simd_*.h files say the same words for one instruction set each.
//
//   kLanes           float lanes of a vector; divides 16
//   kPanelRows       activation rows a linear keeps in registers at once
//   kAttentionTiles  key tiles of 16 tokens scored at once
//   kByteOffset      what dot_bytes leaves added to each weight: 128 where the instruction takes unsigned weights and the
//                    caller corrects by the sum of x, 0 where dot_bytes takes it off itself

constexpr int kLanes = 4;
constexpr int kPanelRows = 2;
constexpr int kAttentionTiles = 1;
constexpr int kByteOffset = 0;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats splat(float v) { return Floats{v, v, v, v}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats multiply(Floats a, Floats b) { return a * b; }
inline Floats divide(Floats a, Floats b) { return a / b; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats blend(Ints mask, Floats yes, Floats no) {
  return reinterpret_cast<Floats>((mask & reinterpret_cast<Ints>(yes)) | (~mask & reinterpret_cast<Ints>(no)));
}
inline Floats maximum(Floats a, Floats b) { return blend(a > b, a, b); }
inline Floats minimum(Floats a, Floats b) { return blend(a < b, a, b); }
inline Floats absolute(Floats a) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(a) & 0x7fffffff); }
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) { return blend(a < b, yes, no); }
inline bool any_greater(Floats a, Floats b) {
  const Ints greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline Floats first_lanes(Floats v, int count, Floats rest) {
  return blend(Ints{0, 1, 2, 3} < Ints{count, count, count, count}, v, rest);
}
inline float reduce_add(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Floats v) {
  const float low = v[0] > v[1] ? v[0] : v[1];
  const float high = v[2] > v[3] ? v[2] : v[3];
  return low > high ? low : high;
}
inline float float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t rest = bits & 0x7fffU;
  float value;
  uint32_t word = (rest << 13) + (112U << 23);
  if (rest >= 0x7c00U) word += 112U << 23;  // infinities and NaN
  __builtin_memcpy(&value, &word, 4);
  if (rest < 0x0400U) value = static_cast<float>(rest) * 0x1p-24F;  // subnormal
  __builtin_memcpy(&word, &value, 4);
  word |= sign;
  __builtin_memcpy(&value, &word, 4);
  return value;
}
inline Floats load_float16(const uint16_t* p) { return Floats{float16(p[0]), float16(p[1]), float16(p[2]), float16(p[3])}; }
inline Floats power_of_two(Ints exponent) { return reinterpret_cast<Floats>((exponent + 127) << 23); }
// To the nearest, ties to even, as the hardware instructions do.
inline Ints round_to_int(Floats v) {
  return Ints{static_cast<int32_t>(lrintf(v[0])), static_cast<int32_t>(lrintf(v[1])), static_cast<int32_t>(lrintf(v[2])),
              static_cast<int32_t>(lrintf(v[3]))};
}
inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

inline Ints splat_int(int32_t v) { return Ints{v, v, v, v}; }
inline Ints splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return splat_int(word);
}
inline int32_t reduce_add(Ints v) { return v[0] + v[1] + v[2] + v[3]; }
inline Ints add(Ints a, Ints b) { return a + b; }
inline void store_bytes(int8_t* p, Ints v) {
  for (int i = 0; i < kLanes; i++) p[i] = static_cast<int8_t>(v[i]);
}
inline Ints load_words(const void* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Ints low_nibbles(Ints v) { return v & 0x0f0f0f0f; }
inline Ints high_nibbles(Ints v) { return (v >> 4) & 0x0f0f0f0f; }
// Four products per lane of unsigned weights and signed activations, added to the lane's sum.
inline Ints dot_nibbles(Ints sum, Ints w, Ints x) {
  for (int byte = 0; byte < 4; byte++) sum += ((w >> (8 * byte)) & 0xff) * ((x << (24 - 8 * byte)) >> 24);
  return sum;
}
inline Ints dot_bytes(Ints sum, Ints w, Ints x) {
  for (int byte = 0; byte < 4; byte++) sum += (((w >> (8 * byte)) & 0xff) - 128) * ((x << (24 - 8 * byte)) >> 24);
  return sum;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void store_bfloats(uint16_t* p, Floats v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; i++) p[i] = to_bfloat(lanes[i]);
}
// Two products per lane: w and x hold pairs of bfloat16.
inline Floats dot_bfloats(Floats sum, Ints w, Ints x) {
  const Ints high = splat_int(static_cast<int32_t>(0xffff0000U));
  sum = multiply_add(reinterpret_cast<Floats>(w << 16), reinterpret_cast<Floats>(x << 16), sum);
  return multiply_add(reinterpret_cast<Floats>(w & high), reinterpret_cast<Floats>(x & high), sum);
}
