// The instruction sets, and which of them is in use. Each is a file here, which defines its Isa by including the
// kernels inside a region that is compiled for it; see target.h.
#pragma once

#include <string>
#include <vector>

#include "../kernels/table.h"
#include "../kernels/stem_training_table.h"

namespace shufflenet::cpu {

class Isa {
 public:
  virtual const char* name() const = 0;
  virtual bool is_usable() const = 0;  // on this processor

  // The kernels on planes of floats, for tensors of the dtype.
  virtual const Kernels& kernels(Dtype) const = 0;
  // Those on planes of pairs, for tensors of bfloat16 or float32. Null without dot products of bfloat16.
  virtual const Kernels* pair_kernels(Dtype) const { return nullptr; }

  // Those of training, on planes of the dtype.
  virtual const TrainingKernel& training(Dtype) const = 0;
  // Those of a stem's training, for images of the dtype.
  virtual const StemTrainingKernel& stem_training(Dtype) const = 0;

  // Converts n elements of the dtype to its accumulator type.
  virtual void to_accumulator(Dtype, const void* from, void* to, int64_t n) const = 0;
  // Does so many rounds of multiply-adds in registers, the fastest that the ISA can, and returns how many they were.
  virtual int64_t multiply_add(Dtype, int64_t rounds) const = 0;
};

#if defined(__aarch64__)
extern const Isa& neon_isa;  // which every AArch64 processor has: no baseline beside it
#else
extern const Isa& baseline_isa;
#endif
#if defined(__x86_64__)
extern const Isa& avx2_isa;
extern const Isa& avx512_isa;
extern const Isa& avx512_bf16_isa;
extern const Isa& amx_isa;
#endif

// The instruction sets that the library was compiled for and that this processor has, the most capable last.
std::vector<std::string> usable_isas();

// The ISA in use: the most capable, or what SHUFFLENET_EXT_CPU_ISA or select_isa named.
const Isa& isa();
void select_isa(const std::string& name);

}  // namespace shufflenet::cpu
