#define MK_NAME "neon-dotprod"
#define MK_TABLE kNeonKernels
#define MK_SIMD "simd_neon.h"
#define MK_REGISTERS 32
#include "kernels.h"
