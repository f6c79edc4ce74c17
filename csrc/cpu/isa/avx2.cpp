#if defined(__x86_64__)
#include "target.h"

#define SHUFFLENET_ISA avx2
SHUFFLENET_TARGET_BEGIN("avx2,fma")
#include "avx2.h"
#include "../kernels/kernels.h"
SHUFFLENET_TARGET_END

namespace shufflenet::cpu {
namespace {

class Avx2 final : public avx2::FloatIsa {
  const char* name() const override { return "avx2"; }
  bool is_usable() const override { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
};
constexpr Avx2 kAvx2;

}  // namespace
const Isa& avx2_isa = kAvx2;

}  // namespace shufflenet::cpu
#endif
