// Calls of the ops as steps, on raw pointers: what runs, and how.
#pragma once

#include "step.h"
#include "weights.h"

namespace shufflenet::cpu {

// The tensors of a call: x and the result are dense, and of the dtype.
struct Call {
  const void* x = nullptr;
  void* result = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t images = 0;
};

void run_program(const Program& program, const PackedWeights& weights, const Call& call);

// The same with the convolutions of the steps in their order, in the accumulator type.
void run_program(const Program& program, const Convolution* convolutions, const Call& call);

// How a call of run_program runs, in words and numbers, for explain.
struct Description {
  Images images;
  std::vector<StepDescription> steps;
};

// Says how run_program would run with weights of a dtype on so many threads. Nothing is run.
Description describe_program(const Program& program, Dtype weights, const Call& call, int64_t threads);

// Measures the floating-point operations a second that torch's threads do at most, for some 30 milliseconds.
double measure_peak(Dtype dtype);

}  // namespace shufflenet::cpu
