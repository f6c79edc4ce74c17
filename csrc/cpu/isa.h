// One file an ISA: isa_*.cpp. Each defines its Isa by including the kernel sources inside a region compiled for it.
// Every standard header must come before that region: an inline function of the standard library compiled for AVX-512
// could otherwise be picked by the linker for the whole library, and crash on a processor without it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace shufflenet::cpu {

#if defined(__aarch64__)
extern const Isa neon_isa;  // which every AArch64 processor has: no baseline beside it
#else
extern const Isa baseline_isa;
#endif
#if defined(__x86_64__)
extern const Isa avx2_isa;
extern const Isa avx512_isa;
extern const Isa avx512_bf16_isa;
extern const Isa amx_isa;
#endif

}  // namespace shufflenet::cpu
