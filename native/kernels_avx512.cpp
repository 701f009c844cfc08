#define MK_NAME "avx512-vnni"
#define MK_TABLE kAvx512Kernels
#define MK_SIMD "simd_avx512.h"
#define MK_REGISTERS 32
#include "kernels.h"
