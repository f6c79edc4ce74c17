#if !defined(__aarch64__)
#include "isa.h"

#define SHUFFLENET_ISA baseline
#include "simd_baseline.h"
#include "unit_kernel.h"
#include "network_kernel.h"

namespace shufflenet::cpu {

static bool usable() { return true; }
const Isa baseline_isa = {
    "baseline", usable, baseline::unit_kernel, baseline::network_kernel, nullptr, baseline::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
