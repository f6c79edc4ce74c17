// The interface between the op (which splits work over threads) and the kernels (compiled once per ISA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../unit.h"

namespace shufflenet::cpu {

// A share of a unit's work: some rows and slices of one image. Parts write disjoint elements of the result, and what
// they write does not depend on how a unit is cut into parts.
struct Part {
  int64_t image = 0;
  int64_t row_begin = 0, row_end = 0;      // of the result
  int64_t slice_begin = 0, slice_end = 0;  // of Unit::groups
};

struct UnitKernel {
  // Bytes of scratch memory, aligned to kScratchAlignment, that run needs for a part.
  int64_t (*scratch_bytes)(const Unit&, const Part&);
  void (*run)(const Unit&, const UnitPointers&, const Part&, void* scratch);
  // Converts n elements of the dtype to the accumulator type.
  void (*to_accumulator)(const void* from, void* to, int64_t n);
};

inline constexpr int64_t kScratchAlignment = 64;

struct Isa {
  const char* name;
  bool (*usable)();                  // on this processor
  UnitKernel (*unit_kernel)(Dtype);  // Dtype's accumulator is double for float64, float for all others
  int64_t vector_bytes;
};

// The instruction sets that the library was compiled for and that this processor has, the most capable last.
std::vector<std::string> usable_isas();

// The ISA in use: the most capable, or what SHUFFLENET_EXT_CPU_ISA or select_isa named.
const Isa& isa();
void select_isa(const std::string& name);

}  // namespace shufflenet::cpu
