// Which instruction set's kernels run: the best this processor has, unless told otherwise.
#include <atomic>
#include <cstdio>
#include <cstring>

#include "internal.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace millicent {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
bool has_neon_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1UL << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return true;  // every arm64 Mac has it
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

struct Choices {
  const Kernels* kernels[4];
  int count = 0;
  char names[128] = "";

  Choices() {
    const Candidate candidates[] = {
#if defined(__x86_64__)
        {kAvx512Bf16Kernels, has_avx512_bf16()},
        {kAvx512Kernels, has_avx512()},
        {kAvx2Kernels, has_avx2()},
#elif defined(__aarch64__)
        {kNeonKernels, has_neon_dotprod()},
#endif
        {kPortableKernels, true},
    };
    for (const Candidate& candidate : candidates) {
      if (!candidate.supported) continue;
      kernels[count++] = candidate.kernels;
      if (count > 1) std::strcat(names, ",");
      std::strcat(names, candidate.kernels->name);
    }
  }
};

const Choices& choices() {
  static const Choices instance;
  return instance;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> instance{choices().kernels[0]};
  return instance;
}

}  // namespace

const Kernels& kernels_in_use() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace millicent

using namespace millicent;

extern "C" {

int32_t mk_interface_version(void) { return MK_INTERFACE_VERSION; }

const char* mk_instruction_sets(void) { return choices().names; }

const char* mk_instruction_set(void) { return kernels_in_use().name; }

int32_t mk_use_instruction_set(const char* name) {
  for (int i = 0; i < choices().count; i++) {
    if (std::strcmp(choices().kernels[i]->name, name) != 0) continue;
    chosen().store(choices().kernels[i], std::memory_order_relaxed);
    return 0;
  }
  return -1;
}

}  // extern "C"
