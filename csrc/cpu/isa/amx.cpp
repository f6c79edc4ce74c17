// AMX's tiles of bfloat16. What they do not compute is AVX-512's.
#if defined(__x86_64__)
#include "target.h"

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "avx512_with_pairs.h"

#define SHUFFLENET_ISA amx
SHUFFLENET_TARGET_BEGIN(SHUFFLENET_AMX)
#include "avx512.h"
#include "pairs_avx512.h"
#include "dot_amx.h"
#include "../kernels/pair_kernels.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {
namespace {

// Asks the system for AMX's tiles, which it grants to the whole process.
bool tiles_are_granted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

class Amx final : public Avx512WithPairs {
  const char* name() const override { return "amx"; }
  bool is_usable() const override {
    unsigned a, b, c, d;
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    if (!avx512_bf16_isa.is_usable() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & kBFloat16) && (d & kTiles) && tiles_are_granted();
  }
  const Kernels* pair_kernels(Dtype dtype) const override { return &amx::pair_kernels(dtype); }
  const TrainingKernel& training_of_pairs() const override { return amx_training; }
};
constexpr Amx kAmx;

}  // namespace
const Isa& amx_isa = kAmx;

}  // namespace shufflenet::cpu
#endif
