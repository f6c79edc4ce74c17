#if defined(__aarch64__)
#include "isa.h"

#include <arm_neon.h>

// Every AArch64 compiler has NEON on; the region is there for GCC's scheduler. Before it allocates registers it moves
// the loads of a tile's weights together, and then spills accumulators in the inner loop, of 24 multiply-adds.
#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")
#endif

#define SHUFFLENET_ISA neon
#include "simd_neon.h"
#include "unit_kernel.h"
#include "network_kernel.h"

#if !defined(__clang__)
#pragma GCC pop_options
#endif

namespace shufflenet::cpu {

static bool usable() { return true; }
const Isa neon_isa = {"neon", usable, neon::unit_kernel, neon::network_kernel, nullptr, neon::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
