// Chooses a unit's Tiling for a device. Pure host code, which needs no CUDA: it is tested on the CPU for every shape of
// the paper and every architecture that is built.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>
#include <string>

#include "tiling.h"

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

struct Plan {
  bool ok = false;
  Tiling tiling;
  int64_t shared_bytes = 0;
  int64_t windows = 0;
  int blocks_per_multiprocessor = 0;
  double cycles = 0;  // the model's, of the whole launch
  std::string explanation;
};

inline int element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 || dtype == Dtype::tfloat32 ? 4 : 2;
}
inline int accumulator_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }
inline bool uses_mma(Dtype dtype, const Device& device) {
  const bool from_sm_80 = dtype == Dtype::bfloat16 || dtype == Dtype::tfloat32;
  return dtype == Dtype::float16 || (from_sm_80 && device.compute_capability >= 80);
}

inline Sizes sizes_of(const Unit& unit) {
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  return {unit.batch,
          narrow(unit.in_channels),
          narrow(unit.height),
          narrow(unit.width),
          narrow(unit.mid_channels),
          narrow(unit.out_channels),
          narrow(unit.conv1_groups),
          narrow(unit.groups),
          narrow(unit.stride),
          narrow(unit.out_height()),
          narrow(unit.out_width()),
          narrow(unit.result_channels()),
          unit.conv2_relu,
          unit.pool_count_include_pad};
}

// The addresses that a launch works on; their alignment bounds the vectors.
struct Addresses {
  uint64_t x = 0, conv1_weight = 0, conv3_weight = 0, result = 0;
};

// Bytes of an access: 16, or the largest power of two below that divides every distance between accesses.
inline int vector_bytes(std::initializer_list<int64_t> distances) {
  int64_t divisor = 16;
  for (int64_t distance : distances) divisor = std::gcd(divisor, distance);
  return static_cast<int>(divisor);
}

inline void choose_vectors(const Unit& unit, Dtype dtype, Tiling& t, const Addresses& at = {}) {
  const int64_t e = element_bytes(dtype);
  const Sizes s = sizes_of(unit);
  const auto address = [](uint64_t a) { return static_cast<int64_t>(a % 16); };
  const int64_t residual = unit.adds_residual() ? address(at.x) : 0;
  t.conv1_vector = vector_bytes({unit.conv1_depth() * e, address(at.conv1_weight)});
  t.conv3_vector = vector_bytes({unit.slice_channels() * e, address(at.conv3_weight)});
  if (unit.layout == Layout::channels_last) {
    t.x_vector = vector_bytes({unit.in_channels * e, unit.conv1_depth() * e, address(at.x)});
    // Tiles of conv3 start whole eights of rows into a group; without conv3, chunks are what is written.
    const int64_t start = unit.has_conv3() ? unit.out_channels / unit.groups * e
                                           : std::gcd(unit.slice_channels() * e * t.slices, int64_t{t.chunk} * e);
    t.result_vector = vector_bytes({unit.result_channels() * e, start, address(at.result), residual});
  } else if (t.column_tiles(s) == 1) {
    const int64_t in_row = t.row_tiles(s) == 1 ? 16 : unit.width * e;
    const int64_t out_start = t.row_tiles(s) == 1 ? 16 : t.tile_rows * unit.out_width() * e;
    t.x_vector = vector_bytes({unit.height * unit.width * e, in_row, address(at.x)});
    t.result_vector = vector_bytes({unit.out_height() * unit.out_width() * e, out_start, address(at.result), residual});
  } else {
    t.x_vector = t.result_vector = 1;  // a window's pixels do not lie together
  }
  // Element by element where no access of the kernel's is as narrow as that: copies of 4 bytes, writes of 8.
  const int element = element_bytes(dtype);
  for (int* vector : {&t.x_vector, &t.conv1_vector, &t.conv3_vector}) *vector = *vector < 4 ? element : *vector;
  if (t.result_vector < 8) t.result_vector = element;
}

inline int blocks_per_multiprocessor(int64_t shared_bytes, int accumulator, const Device& device) {
  constexpr int64_t kReservedPerBlock = 1024;  // of shared memory, by the system, from sm_80 on
  const int64_t by_shared = device.shared_per_multiprocessor / (shared_bytes + kReservedPerBlock);
  const int64_t by_threads = device.threads_per_multiprocessor / kThreads;
  const int64_t blocks = std::min({by_shared, by_threads, int64_t{blocks_by_registers(accumulator)}});
  return static_cast<int>(std::max<int64_t>(blocks, shared_bytes <= device.shared_per_block ? 1 : 0));
}

// What a multiprocessor does in a cycle. Estimates, made without a GPU; only their proportions matter to the choice.
struct Rates {
  double multiply_adds, copied_bytes, depthwise_outputs, step_latency, window_latency;
};
inline Rates rates_of(Dtype dtype, const Device& device) {
  const bool fast_double =
      device.compute_capability == 80 || device.compute_capability == 90 || device.compute_capability == 100;
  double multiply_adds = 48;  // float32: 128 lanes, held up by 8 loads for 16 multiply-adds
  if (dtype == Dtype::float64) multiply_adds = fast_double ? 32 : 2;
  if (uses_mma(dtype, device)) multiply_adds = 1024 / element_bytes(dtype);  // by what the fragments' loads allow
  return {multiply_adds, 24, 4, 500, 3000};
}

// Cycles of the launch: bound by a multiprocessor's work, or by the latency of the blocks that it runs side by side.
inline double predicted_cycles(const Sizes& s, const Tiling& t, Dtype dtype, const Device& device, int blocks) {
  const Rates rates = rates_of(dtype, device);
  const double e = element_bytes(dtype);
  const bool mma = uses_mma(dtype, device);
  const int pixel_step = mma ? 16 : kTilePixels;
  const int slice = s.mid_channels / s.groups;
  const double channels = double(slice) * t.slices;
  const double in_pixels = double(std::min((t.tile_rows - 1) * s.stride + 3, s.height)) *
                           std::min((t.tile_columns - 1) * s.stride + 3, s.width);
  const double out_pixels = double(t.tile_rows) * t.tile_columns;
  const auto padded = [&](double n, double step) { return std::ceil(n / step) * step; };
  const double depth = s.in_channels / s.conv1_groups;
  const double tile_depth = kTileDepthBytes / e;
  const double run = std::ceil(channels / s.groups);  // rows of conv1 together
  const double runs = std::min<double>(s.groups, channels);
  const double run_tiles = std::ceil(run / kTileRows);
  const double in_tiles = std::ceil(in_pixels / kTilePixels), out_tiles = std::ceil(out_pixels / kTilePixels);
  const double group_rows = s.out_channels / s.groups;
  const double row_tiles = std::ceil(group_rows / kTileRows);

  const double multiply_adds =
      padded(in_pixels, pixel_step) * runs * padded(run, 8) * padded(depth, mma ? kDepthStep : 1) +
      padded(out_pixels, pixel_step) * t.slices * padded(group_rows, 8) * padded(slice, mma ? kDepthStep : 1);
  const double copied = e * (in_pixels * runs * run_tiles * depth + in_tiles * runs * run * depth +
                             out_tiles * t.slices * group_rows * slice + 2 * out_pixels * t.slices * group_rows);
  const double steps = in_tiles * runs * run_tiles * std::ceil(depth / tile_depth) +
                       out_tiles * t.slices * row_tiles * (s.out_channels ? std::ceil(slice / tile_depth) + 3 : 0);
  const double work = multiply_adds / rates.multiply_adds + copied / rates.copied_bytes +
                      channels * out_pixels / rates.depthwise_outputs;
  const double latency = rates.window_latency + steps * rates.step_latency / (t.stages - 1);
  const double windows = static_cast<double>(t.windows(s));
  return std::max(std::ceil(windows / device.multiprocessors) * work,
                  std::ceil(windows / (double(device.multiprocessors) * blocks)) * (work + latency));
}

inline Plan plan_unit(const Unit& unit, Dtype dtype, const Device& device) {
  Plan best;
  std::ostringstream text;
  const int64_t most = std::numeric_limits<int>::max();
  if (std::max({unit.in_channels, unit.mid_channels, unit.out_channels, unit.result_channels()}) > most / 2 ||
      std::max(unit.height, unit.width) > most / 4) {
    best.explanation = "a size of the unit exceeds what the kernel counts in 32 bits";
    return best;
  }
  const Sizes s = sizes_of(unit);
  const int slice = s.mid_channels / s.groups;
  const int e = element_bytes(dtype), a = accumulator_bytes(dtype);
  int64_t least_bytes = std::numeric_limits<int64_t>::max();

  const auto consider = [&](Tiling t) {
    const int64_t pixels = int64_t{t.tile_rows} * t.tile_columns;
    if (pixels * std::max<int64_t>(s.in_channels, s.mid_channels) > most) return;
    const int64_t bytes = SharedLayout(s, t, e, a).bytes;
    least_bytes = std::min(least_bytes, bytes);
    if (bytes > device.shared_per_block) return;
    const int blocks = blocks_per_multiprocessor(bytes, a, device);
    const double cycles = predicted_cycles(s, t, dtype, device, blocks);
    if (best.ok && cycles >= best.cycles) return;
    best = {true, t, bytes, t.windows(s), blocks, cycles, {}};
  };
  // Whole rows of as many slices as fit at once; narrower windows and fewer channels only where none does.
  for (int parts_of_slice = 1; !best.ok; parts_of_slice *= 2) {
    for (int columns = s.out_width; !best.ok; columns = ceil_div(columns, 2)) {
      for (int strips = 1, rows = 0; strips <= s.out_height; ++strips) {
        if (ceil_div(s.out_height, strips) == rows) continue;
        rows = ceil_div(s.out_height, strips);
        for (int parts = 1, slices = 0; parts <= s.groups; ++parts) {
          if (ceil_div(s.groups, parts) == slices) continue;
          slices = ceil_div(s.groups, parts);
          if (parts_of_slice > 1 && slices > 1) continue;
          const int chunk = parts_of_slice == 1 ? slice * slices : ceil_div(slice, parts_of_slice);
          for (int stages = kMinStages; stages <= kMaxStages; ++stages) {
            consider({rows, columns, slices, chunk, stages});
          }
        }
      }
      if (columns == 1) break;
    }
    if (parts_of_slice >= slice) break;
  }
  if (!best.ok) {
    text << "sm_" << device.compute_capability << ": the smallest window of one slice (" << slice
         << " intermediate channels) takes " << least_bytes << " bytes of shared memory, and a block has "
         << device.shared_per_block;
    best.explanation = text.str();
    return best;
  }
  const Tiling& t = best.tiling;
  choose_vectors(unit, dtype, best.tiling);
  text << "sm_" << device.compute_capability << ": windows of " << t.tile_rows << " x " << t.tile_columns
       << " result pixels, " << t.slices << " of " << s.groups << " slices, " << t.chunk
       << " intermediate channels at once; " << best.windows << " blocks of " << kThreads << " threads, "
       << best.shared_bytes << " bytes of shared memory, " << best.blocks_per_multiprocessor << " on a multiprocessor; "
       << t.stages << " stages; " << (uses_mma(dtype, device) ? "tensor cores" : "FMA") << "; accesses of "
       << t.x_vector << " bytes to x, " << t.result_vector << " to the result";
  best.explanation = text.str();
  return best;
}

}  // namespace shufflenet::cuda
