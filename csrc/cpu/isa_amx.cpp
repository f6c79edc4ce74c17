// AMX's tiles of bfloat16: for a program in bfloat16. All else is AVX-512's.
#if defined(__x86_64__)
#include <atomic>

#include "isa.h"

#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#endif

#define SHUFFLENET_ISA amx
#include "simd_avx512.h"
#include "pair_product_amx.h"
#include "pair_network.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace shufflenet::cpu {

// AMX's tiles are the system's to grant, to the whole process.
static bool tiles_granted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static bool usable() {
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!avx512_bf16_isa.usable() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kBFloat16) && (d & kTiles) && tiles_granted();
}

static UnitKernel unit_kernel(Dtype dtype) { return avx512_isa.unit_kernel(dtype); }
static NetworkKernel network_kernel(Dtype dtype) { return avx512_isa.network_kernel(dtype); }
const Isa amx_isa = {"amx", usable, unit_kernel, network_kernel, amx::pair_kernel, amx::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
