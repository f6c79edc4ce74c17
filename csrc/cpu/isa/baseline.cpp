#if !defined(__aarch64__)
#include "target.h"

#define SHUFFLENET_ISA baseline
#include "baseline.h"
#include "../kernels/kernels.h"

namespace shufflenet::cpu {
namespace {

class Baseline final : public baseline::FloatIsa {
  const char* name() const override { return "baseline"; }
  bool is_usable() const override { return true; }
};
constexpr Baseline kBaseline;

}  // namespace
const Isa& baseline_isa = kBaseline;

}  // namespace shufflenet::cpu
#endif
