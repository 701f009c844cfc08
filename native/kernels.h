// The kernels, written once. Each kernels_*.cpp includes this with its own vector vocabulary (MK_SIMD) and compiler
// flags; everything lands in an unnamed namespace, so that code for one processor can never be linked into another's.
#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "internal.h"

#if defined(__clang__)
#define MK_UNROLL _Pragma("unroll")
#else
#define MK_UNROLL _Pragma("GCC unroll 16")
#endif

// Inner loops stay functions of their own: inlined side by side, they cost each other registers.
#define MK_KERNEL __attribute__((noinline))

namespace millicent {
namespace {

#include MK_SIMD

constexpr int kRegisters = MK_REGISTERS;

// e^x to about 2 units in the last place; 0 below -87, where floats run out. Cephes' reduction and polynomial.
inline Floats exponential(Floats x) {
  const Floats clamped = minimum(maximum(x, splat(-87.0F)), splat(88.0F));
  const Ints exponent = round_to_int(multiply(clamped, splat(1.44269504F)));
  const Floats n = to_float(exponent);
  const Floats r = multiply_add(n, splat(2.12194440e-4F), multiply_add(n, splat(-0.693359375F), clamped));
  Floats p = splat(1.9875691500e-4F);
  p = multiply_add(p, r, splat(1.3981999507e-3F));
  p = multiply_add(p, r, splat(8.3334519073e-3F));
  p = multiply_add(p, r, splat(4.1665795894e-2F));
  p = multiply_add(p, r, splat(1.6666665459e-1F));
  p = multiply_add(p, r, splat(5.0000001201e-1F));
  p = multiply_add(multiply(p, r), r, add(r, splat(1.0F)));
  return select_less(x, splat(-87.0F), splat(0.0F), multiply(p, power_of_two(exponent)));
}

// 2^x for x below 126, to about 2 units in the last place; 0 below -126, and NaN stays NaN.
inline Floats two_to_the(Floats x) {
  const Ints exponent = round_to_int(x);
  const Floats r = subtract(x, to_float(exponent));
  Floats p = splat(1.3276471781e-3F);
  p = multiply_add(p, r, splat(9.6755413327e-3F));
  p = multiply_add(p, r, splat(5.5507132742e-2F));
  p = multiply_add(p, r, splat(2.4022119724e-1F));
  p = multiply_add(p, r, splat(6.9314696706e-1F));
  p = multiply_add(p, r, splat(1.0F));
  return select_less(x, splat(-126.0F), splat(0.0F), multiply(p, power_of_two(exponent)));
}

inline Floats silu(Floats x) {
  return divide(x, add(splat(1.0F), exponential(subtract(splat(0.0F), x))));
}

#include "linear.h"
#include "attention.h"
#include "sampling.h"

constexpr Kernels kTable = {MK_NAME, kPanelRows, fill_panel, linear_tile, rotate_and_write, attend,
                            sample_scratch_bytes, sample_row, score_row};

}  // namespace

extern const Kernels* const MK_TABLE;
const Kernels* const MK_TABLE = &kTable;

}  // namespace millicent
