#if defined(__x86_64__)
#include "isa.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define SHUFFLENET_ISA avx512
#include "simd_avx512.h"
#include "unit_kernel.h"
#include "network_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace shufflenet::cpu {

static bool usable() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
const Isa avx512_isa = {"avx512", usable, avx512::unit_kernel, avx512::network_kernel, nullptr, avx512::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
