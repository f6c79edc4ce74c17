// AVX-512 with dot products of bfloat16: for what is in bfloat16. All else is done by AVX-512's kernels.
#pragma once

#include "isa.h"

namespace shufflenet::cpu {

// Training in bfloat16.
extern const TrainingKernel& avx512_bf16_training;
extern const TrainingKernel& amx_training;

class Avx512WithPairs : public Isa {
 public:
  const Kernels& kernels(Dtype dtype) const override { return avx512_isa.kernels(dtype); }
  const TrainingKernel& training(Dtype dtype) const override {
    return dtype == Dtype::bfloat16 ? training_of_pairs() : avx512_isa.training(dtype);
  }
  const StemTrainingKernel& stem_training(Dtype dtype) const override { return avx512_isa.stem_training(dtype); }
  void to_accumulator(Dtype dtype, const void* from, void* to, int64_t n) const override {
    avx512_isa.to_accumulator(dtype, from, to, n);
  }
  int64_t multiply_add(Dtype dtype, int64_t rounds) const override { return avx512_isa.multiply_add(dtype, rounds); }

 private:
  virtual const TrainingKernel& training_of_pairs() const = 0;
};

}  // namespace shufflenet::cpu
