#if defined(__aarch64__)
#include "target.h"

#define SHUFFLENET_ISA neon
SHUFFLENET_UNSCHEDULED_BEGIN
#include "neon.h"
#include "../kernels/kernels.h"
SHUFFLENET_UNSCHEDULED_END

namespace shufflenet::cpu {
namespace {

class Neon final : public neon::FloatIsa {
  const char* name() const override { return "neon"; }
  bool is_usable() const override { return true; }
};
constexpr Neon kNeon;

}  // namespace
const Isa& neon_isa = kNeon;

}  // namespace shufflenet::cpu
#endif
