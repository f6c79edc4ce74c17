#if !defined(__aarch64__)
#include "isa.h"

#define SHUFFLENET_ISA baseline
#include "simd_baseline.h"
//
#include "simd.h"
//
#include "unit_kernel.h"
//
#include "network_kernel.h"
//
#include "pairs.h"
//
#include "pairs_emulated.h"
//
#include "pair_product.h"
//
#include "pair_kernel.h"

namespace shufflenet::cpu {

static bool usable() { return true; }
const Isa baseline_isa = {
    "baseline", usable, baseline::unit_kernel, baseline::network_kernel, baseline::pair_kernel, baseline::kVectorBytes};

}  // namespace shufflenet::cpu
#endif
