// Sixteen lanes: AVX-512 with VNNI, and BF16 where the compiler was told so. See simd_portable.h for what each name means.

constexpr int kLanes = 16;
constexpr int kPanelRows = 6;
constexpr int kAttentionTiles = 4;
constexpr int kByteOffset = 128;

using Floats = __m512;
using Ints = __m512i;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }
inline Floats select_less(Floats a, Floats b, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline bool any_greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline Floats first_lanes(Floats v, int count, Floats rest) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1U << count) - 1U), rest, v);
}
inline float reduce_add(Floats v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Floats v) { return _mm512_reduce_max_ps(v); }
inline Floats load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats power_of_two(Ints exponent) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23));
}
inline Ints round_to_int(Floats v) { return _mm512_cvtps_epi32(v); }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }

inline Ints splat_int(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline int32_t reduce_add(Ints v) { return _mm512_reduce_add_epi32(v); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline void store_bytes(int8_t* p, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
inline Ints load_words(const void* p) { return _mm512_loadu_si512(p); }
inline Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline Ints dot_nibbles(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints dot_bytes(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#if defined(__AVX512BF16__)
inline Floats dot_bfloats(Floats sum, Ints w, Ints x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}
inline void store_bfloats(uint16_t* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
#else
inline Floats dot_bfloats(Floats sum, Ints w, Ints x) {
  const Ints high = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  sum = multiply_add(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
  return multiply_add(_mm512_castsi512_ps(_mm512_and_si512(w, high)), _mm512_castsi512_ps(_mm512_and_si512(x, high)), sum);
}
inline void store_bfloats(uint16_t* p, Floats v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; i++) p[i] = to_bfloat(lanes[i]);
}
#endif
