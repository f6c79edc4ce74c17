// What a warp of unit_kernel.cuh multiplies, in conv1 and in conv3: 16 lines by some eights of places, both in shared
// memory. MmaEngine does so where there are tensor cores for the dtype, FmaEngine elsewhere.
#pragma once

#include "common.cuh"
#include "tiling.h"

namespace shufflenet::cuda {

// The 16 lines of a product's first operand in shared memory: y2, weights, or a tile of x. What lies side by side is
// the depth of a line or, where an engine is called with kDepthMajor, the lines at one depth.
template <class T>
struct Lines {
  Shared<const T> data;
  int pitch;
};

// A lane's accumulator sum[j][i] belongs to line(i) and place(j, i) of the product.
SHUFFLENET_DEVICE int line(int i) { return lane_index() / 4 + i / 2 * 8; }
SHUFFLENET_DEVICE int place(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }

// Returns the place in the product at which element e of the kElements that a warp writes side by side is computed. In
// the product, a lane holds places 8 * j + 2 * (lane % 4) and the one behind, for j = 0 to 3. This mapping gives each
// lane eight neighbouring elements instead, which it writes in wide accesses. It swaps bits 1 and 2 of e with bits 3
// and 4, and so is its own inverse.
SHUFFLENET_DEVICE int place(int e) { return (e & ~0x1e) | (e >> 3 & 3) << 1 | (e >> 1 & 3) << 3; }

// Multiplies by FMA instructions. It loads 8 bytes of depth at a time, as 16 would take more registers than there are.
// The lanes' loads touch different banks of shared memory, or the same address, which is read once for all.
template <class T>
struct FmaEngine {
  using A = accumulator_t<T>;
  static constexpr int kDepth = 8 / static_cast<int>(sizeof(T));
  using Block = Vector<T, kDepth>;

  template <bool kDepthMajor, int kTiles>
  SHUFFLENET_DEVICE static void multiply(A (&sum)[kTiles][4], const Lines<T>& lines, Shared<const T> elements,
                                         int pitch, int tiles, int depth) {
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kDepth) {
      Block a[2];
      SHUFFLENET_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (kDepthMajor) {
          SHUFFLENET_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            a[half].elements[i] = lines.data[(k + i) * lines.pitch + line(2 * half)];
          }
        } else {
          a[half] = shared_as<const Block>(lines.data + (line(2 * half) * lines.pitch + k))[0];
        }
      }
      SHUFFLENET_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        if (j >= tiles) break;
        SHUFFLENET_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          const Block b = shared_as<const Block>(elements + (place(j, odd) * pitch + k))[0];
          SHUFFLENET_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            SHUFFLENET_UNROLL
            for (int half = 0; half < 2; ++half) {
              A& to = sum[j][2 * half + odd];
              to = multiply_add(widen(a[half].elements[i]), widen(b.elements[i]), to);
            }
          }
        }
      }
    }
  }
};

// Multiplies on tensor cores: 16 lines (matrix a, 16 x kStep) by eight places at a time (matrix b, kStep x 8). Lanes
// hold the fragments as the PTX manual draws them for mma.m16n8k16, and for mma.m16n8k8 of TF32.
template <class T>
struct MmaEngine {
  template <bool kDepthMajor, int kTiles>
  SHUFFLENET_DEVICE static void multiply(float (&sum)[kTiles][4], const Lines<T>& lines, Shared<const T> elements,
                                         int pitch, int tiles, int depth) {
    const int lane = lane_index();
    SHUFFLENET_NO_UNROLL
    for (int k = 0; k < depth; k += kStep<T>) {
      uint32_t a[4];
      if constexpr (kDepthMajor && sizeof(T) == 4) {
        SHUFFLENET_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = bits_of(lines.data[(k + lane % 4 + i / 2 * 4) * lines.pitch + lane / 4 + i % 2 * 8]);
        }
      } else if constexpr (kDepthMajor) {
        // In memory these are matrices of 8 depths x 8 lines; the load transposes them.
        load_matrices<true, T>(a, lines.data + ((k + lane % 8 + lane / 16 * 8) * lines.pitch + lane / 8 % 2 * 8));
      } else {
        load_matrices<false, T>(a, lines.data + (lane % 16 * lines.pitch + k + lane / 16 * kPerBlock<T>));
      }
      round_operands<T>(a);
      SHUFFLENET_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        if (j >= tiles) break;
        uint32_t b[4];
        // Where the number of tiles is odd, nothing may be read behind the last: its second half reads that row again.
        const int at = least(8 * j + lane / 16 * 8 + lane % 8, 8 * tiles - 1);
        load_matrices<false, T>(b, elements + (at * pitch + k + lane / 8 % 2 * kPerBlock<T>));
        round_operands<T>(b);
        SHUFFLENET_UNROLL
        for (int next = 0; next < 2; ++next) {
          if constexpr (kHasMmaK16) {
            multiply_matrices(sum[j + next], a, {b[2 * next], b[2 * next + 1]}, T{});
          } else {
            SHUFFLENET_UNROLL
            for (int half = 0; half < 2; ++half) {
              multiply_matrices(sum[j + next], {a[2 * half], a[2 * half + 1]}, b[2 * next + half], T{});
            }
          }
        }
      }
    }
  }
};

// Which of the two multiplies elements of type T.
template <class T, bool kMma = kHasMma<T>>
struct EngineOf {
  using Type = FmaEngine<T>;
};
template <class T>
struct EngineOf<T, true> {
  using Type = MmaEngine<T>;
};

template <class A, int kTiles>
SHUFFLENET_DEVICE void clear(A (&sum)[kTiles][4]) {
  SHUFFLENET_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) sum[j][i] = A{0};
  }
}

}  // namespace shufflenet::cuda
