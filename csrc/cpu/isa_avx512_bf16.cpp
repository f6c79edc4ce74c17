// AVX-512 with dot products of bfloat16: for a program in bfloat16. All else is AVX-512's.
#if defined(__x86_64__)
#include "isa.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define SHUFFLENET_ISA avx512_bf16
#include "simd_avx512.h"
#include "pair_product.h"
#include "pair_network.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace shufflenet::cpu {

static bool usable() { return avx512_isa.usable() && __builtin_cpu_supports("avx512bf16"); }

static UnitKernel unit_kernel(Dtype dtype) { return avx512_isa.unit_kernel(dtype); }
static NetworkKernel network_kernel(Dtype dtype) { return avx512_isa.network_kernel(dtype); }
const Isa avx512_bf16_isa = {
    "avx512_bf16", usable, unit_kernel, network_kernel, avx512_bf16::pair_kernel, avx512_bf16::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
