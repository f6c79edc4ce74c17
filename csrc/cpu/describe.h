// How a call of shuffle_network runs, in words and numbers, for explain: what steps.h decided. Nothing is run.
#pragma once

#include <string>

#include "../program.h"
#include "kernels.h"

namespace shufflenet::cpu {

// How an image goes through a step.
struct RunDescription {
  std::string cut;          // into what the work is cut
  std::vector<Tile> tiles;  // of its pointwise convolutions
  int64_t bytes = 0;        // that a thread works in beside weights, input and result
};

struct StepDescription {
  std::vector<int64_t> input, output;  // sizes of an image
  int64_t multiply_adds = 0;           // of an image
  int64_t weights_and_biases = 0;
  RunDescription alone, shared;  // run by one thread; shared by all
  std::string name = {};         // of what is not a step of the program
};

struct Description {
  int64_t images_alone = 0, images_shared = 0;
  std::vector<StepDescription> steps;
};

inline std::string cut_into(int64_t n, const char* parts) { return n == 1 ? "whole" : std::to_string(n) + " " + parts; }

// Of an x of the dtype.
Description describe(const Program& program, Dtype dtype, Dtype weights_dtype, int64_t images, int64_t threads);

// Floating-point operations a second that torch's threads do at most, measured for some 30 milliseconds.
double measure_peak(Dtype dtype);

}  // namespace shufflenet::cpu
