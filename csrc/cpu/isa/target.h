// The region that an ISA's kernels are compiled in, between SHUFFLENET_TARGET_BEGIN and SHUFFLENET_TARGET_END.
//
// Every standard header, and all that is not compiled for each ISA, must come before that region, which including this
// file first takes care of: an inline function compiled for AVX-512 could be picked by the linker for the whole
// library, and crash on a processor without it. For the same reason all that is in the region is in a namespace of the
// ISA.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SHUFFLENET_PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define SHUFFLENET_TARGET_BEGIN(isas) \
  SHUFFLENET_PRAGMA(clang attribute push(__attribute__((target(isas))), apply_to = function))
#define SHUFFLENET_TARGET_END SHUFFLENET_PRAGMA(clang attribute pop)
#define SHUFFLENET_UNSCHEDULED_BEGIN
#define SHUFFLENET_UNSCHEDULED_END
#else
#define SHUFFLENET_TARGET_BEGIN(isas) SHUFFLENET_PRAGMA(GCC push_options) SHUFFLENET_PRAGMA(GCC target(isas))
#define SHUFFLENET_TARGET_END SHUFFLENET_PRAGMA(GCC pop_options)
// Every AArch64 compiler has NEON on; its region is there for GCC's scheduler. Before it allocates registers it moves
// the loads of a tile's weights together, and then spills accumulators in the inner loop, of 24 multiply-adds.
#define SHUFFLENET_UNSCHEDULED_BEGIN \
  SHUFFLENET_PRAGMA(GCC push_options) SHUFFLENET_PRAGMA(GCC optimize("no-schedule-insns"))
#define SHUFFLENET_UNSCHEDULED_END SHUFFLENET_PRAGMA(GCC pop_options)
#endif

// What AVX-512 is here, and what the ISAs that build on it have as well. All files of an ISA are compiled for the same.
#define SHUFFLENET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define SHUFFLENET_AVX512_BF16 SHUFFLENET_AVX512 ",avx512bf16"
#define SHUFFLENET_AMX SHUFFLENET_AVX512_BF16 ",amx-tile,amx-bf16"
