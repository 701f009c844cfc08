#define MK_NAME "portable"
#define MK_TABLE kPortableKernels
#define MK_SIMD "simd_portable.h"
#define MK_REGISTERS 16
#include "kernels.h"
