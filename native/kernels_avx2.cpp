#define MK_NAME "avx2"
#define MK_TABLE kAvx2Kernels
#define MK_SIMD "simd_avx2.h"
#define MK_REGISTERS 16
#include "kernels.h"
