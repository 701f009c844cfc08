#define MK_NAME "avx512-bf16"
#define MK_TABLE kAvx512Bf16Kernels
#define MK_SIMD "simd_avx512.h"
#define MK_REGISTERS 32
#include "kernels.h"
