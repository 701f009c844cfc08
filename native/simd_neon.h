// Four lanes: NEON of arm64 with the dot product instructions. See simd_portable.h for what each name means.

constexpr int kLanes = 4;
constexpr int kPanelRows = 4;
constexpr int kAttentionTiles = 1;
constexpr int kByteOffset = 0;

using Floats = float32x4_t;
using Ints = int32x4_t;

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats splat(float v) { return vdupq_n_f32(v); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats divide(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats maximum(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats minimum(Floats a, Floats b) { return vminq_f32(a, b); }
inline Floats absolute(Floats a) { return vabsq_f32(a); }
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline bool any_greater(Floats a, Floats b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
inline Floats first_lanes(Floats v, int count, Floats rest) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(count)), v, rest);
}
inline float reduce_add(Floats v) { return vaddvq_f32(v); }
inline float reduce_max(Floats v) { return vmaxvq_f32(v); }
inline Floats load_float16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats power_of_two(Ints exponent) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
}
inline Ints round_to_int(Floats v) { return vcvtnq_s32_f32(v); }
inline Floats to_float(Ints v) { return vcvtq_f32_s32(v); }

inline Ints splat_int(int32_t v) { return vdupq_n_s32(v); }
inline Ints splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return vdupq_n_s32(word);
}
inline int32_t reduce_add(Ints v) { return vaddvq_s32(v); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline void store_bytes(int8_t* p, Ints v) {
  const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(v), vdup_n_s16(0)));
  vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(bytes), 0);
}
inline Ints load_words(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline Ints low_nibbles(Ints v) { return vandq_s32(v, vdupq_n_s32(0x0f0f0f0f)); }
inline Ints high_nibbles(Ints v) {
  return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4));
}
inline Ints dot_nibbles(Ints sum, Ints w, Ints x) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
inline Ints dot_bytes(Ints sum, Ints w, Ints x) {
  return dot_nibbles(sum, veorq_s32(w, vdupq_n_s32(static_cast<int32_t>(0x80808080U))), x);
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void store_bfloats(uint16_t* p, Floats v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; i++) p[i] = to_bfloat(lanes[i]);
}
inline Floats dot_bfloats(Floats sum, Ints w, Ints x) {
  const Ints high = vdupq_n_s32(static_cast<int32_t>(0xffff0000U));
  sum = vfmaq_f32(sum, vreinterpretq_f32_s32(vshlq_n_s32(w, 16)), vreinterpretq_f32_s32(vshlq_n_s32(x, 16)));
  return vfmaq_f32(sum, vreinterpretq_f32_s32(vandq_s32(w, high)), vreinterpretq_f32_s32(vandq_s32(x, high)));
}
