// What the planners know of a device. Pure host code, which needs no CUDA.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "../unit.h"

namespace shufflenet::cuda {

struct Device {
  int compute_capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int64_t shared_per_block = 0;  // what a kernel can opt in to
  int64_t shared_per_multiprocessor = 0;
  int threads_per_multiprocessor = 0;
};

// A card of each architecture that is built, for tests and for explanations without a GPU.
inline Device device_of(int compute_capability) {
  constexpr int64_t kKiB = 1024;
  switch (compute_capability) {
    case 75: return {75, 40, 64 * kKiB, 64 * kKiB, 1024};       // T4
    case 80: return {80, 108, 163 * kKiB, 164 * kKiB, 2048};    // A100
    case 86: return {86, 84, 99 * kKiB, 100 * kKiB, 1536};      // A40
    case 89: return {89, 142, 99 * kKiB, 100 * kKiB, 1536};     // L40S
    case 90: return {90, 132, 227 * kKiB, 228 * kKiB, 2048};    // H100
    case 100: return {100, 148, 227 * kKiB, 228 * kKiB, 2048};  // B200
    case 120: return {120, 188, 99 * kKiB, 100 * kKiB, 1536};   // RTX PRO 6000
    default: return {};
  }
}

inline int element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 || dtype == Dtype::tfloat32 ? 4 : 2;
}
inline int accumulator_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }
inline bool uses_mma(Dtype dtype, const Device& device) {
  const bool from_sm_80 = dtype == Dtype::bfloat16 || dtype == Dtype::tfloat32;
  return dtype == Dtype::float16 || (from_sm_80 && device.compute_capability >= 80);
}

// Returns a multiprocessor's share of the memory bandwidth, in bytes a cycle.
inline double bandwidth_of(const Device& device) {
  switch (device.compute_capability) {
    case 80: return 12;
    case 90: return 14.5;
    case 100: return 28;
    default: return 5;  // no HBM
  }
}

inline constexpr int64_t kReservedPerBlock = 1024;  // bytes of shared memory that CUDA takes for itself, from sm_80 on
inline constexpr int64_t kSharedWithoutAsking = 48 * 1024;  // what a block has of shared memory without opting in

// What the planners assume of every device.
inline constexpr double kLatency = 1000;        // cycles of a read from memory and the barrier behind it
inline constexpr double kWarpInterval = 6;      // cycles from one instruction of a warp to its next
inline constexpr double kMostInstructions = 3;  // instructions a cycle that four schedulers issue in practice, out of 4

}  // namespace shufflenet::cuda
