#if defined(__x86_64__)
#include "target.h"

#define SHUFFLENET_ISA avx512
SHUFFLENET_TARGET_BEGIN(SHUFFLENET_AVX512)
#include "avx512.h"
#include "../kernels/kernels.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {
namespace {

class Avx512 final : public avx512::FloatIsa {
  const char* name() const override { return "avx512"; }
  bool is_usable() const override {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
};
constexpr Avx512 kAvx512;

}  // namespace
const Isa& avx512_isa = kAvx512;

}  // namespace shufflenet::cpu
#endif
