#if defined(__x86_64__)
#include "isa.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SHUFFLENET_ISA avx2
#include "simd_avx2.h"
#include "unit_kernel.h"
#include "network_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace shufflenet::cpu {

static bool usable() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
const Isa avx2_isa = {"avx2", usable, avx2::unit_kernel, avx2::network_kernel, nullptr, avx2::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
