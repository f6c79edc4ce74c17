// Matrices that the lanes of a warp hold together: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <cstdint>
#include <string>

#include "convert.h"
#include "warp.h"

namespace ptx {

// ---- ldmatrix, stmatrix, movmatrix ----------------------------------------------------------------------------------

// "Threads 0-7" give the addresses of the rows of the first 8x8 matrix, the next eight those of the second, and so on.
// A lane's register i holds, of matrix i, elements 2 * (lane % 4) and the one behind of row lane / 4 (of column lane /
// 4 where .trans is said).
struct Fragment {
  explicit Fragment(int lane) : row(lane / 4), column(lane % 4 * 2) {}
  int row, column;
};
using Matrix = uint16_t[8][8];

inline uint16_t& element(Matrix& matrix, int lane, int half, bool transposed) {
  const Fragment at(lane);
  return transposed ? matrix[at.column + half][at.row] : matrix[at.row][at.column + half];
}

// Calls what a row of a matrix is to do, with the lane that gives its address. Rows are counted as accesses.
template <class Row>
void for_each_row(Warp& warp, const Operand& operand, int matrix, const Row& act) {
  const uint32_t givers = 0xffu << 8 * matrix;
  const Addresses at = addresses(warp, operand, givers);
  count_shared(*warp.count, at, 16, givers);
  for (int row = 0; row < 8; ++row) act(row, 8 * matrix + row, at[8 * matrix + row]);
}

template <int kMatrices, bool kTransposed>
void load_matrices(Warp& warp, const Instruction& x, uint32_t lanes) {
  require_whole(lanes, kAllLanes);
  Matrix matrices[kMatrices];
  for (int i = 0; i < kMatrices; ++i) {
    for_each_row(warp, x.operands[kMatrices], i, [&](int row, int lane, uint64_t at) {
      std::memcpy(matrices[i][row], warp.shared.read(warp.observer(lane), at, 16), 16);
    });
  }
  for (int i = 0; i < kMatrices; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t low = element(matrices[i], lane, 0, kTransposed),
                     high = element(matrices[i], lane, 1, kTransposed);
      warp.row<uint32_t>(x.operands[i])[lane] = low | high << 16;
    }
  }
}

template <int kMatrices, bool kTransposed>
void store_matrices(Warp& warp, const Instruction& x, uint32_t lanes) {
  require_whole(lanes, kAllLanes);
  for (int i = 0; i < kMatrices; ++i) {
    Matrix matrix;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t value = warp.row<uint32_t>(x.operands[1 + i])[lane];
      element(matrix, lane, 0, kTransposed) = static_cast<uint16_t>(value);
      element(matrix, lane, 1, kTransposed) = static_cast<uint16_t>(value >> 16);
    }
    for_each_row(warp, x.operands[0], i, [&](int row, int lane, uint64_t at) {
      std::memcpy(warp.shared.write(warp.observer(lane), at, 16), matrix[row], 16);
    });
  }
}

inline void transpose_matrix(Warp& warp, const Instruction& x, uint32_t lanes) {
  require_whole(lanes, kAllLanes);
  Matrix matrix;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t value = warp.row<uint32_t>(x.operands[1])[lane];
    element(matrix, lane, 0, false) = static_cast<uint16_t>(value);
    element(matrix, lane, 1, false) = static_cast<uint16_t>(value >> 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t low = element(matrix, lane, 0, true), high = element(matrix, lane, 1, true);
    warp.row<uint32_t>(x.operands[0])[lane] = low | high << 16;
  }
}

// ---- mma ------------------------------------------------------------------------------------------------------------

struct TFloat {};  // tf32: a float whose lowest 13 bits are 0, or the NaN that cvt makes

// How many elements a register of an operand holds, and the columns of a (the rows of b) from one to the next.
template <class T>
inline constexpr int kPerRegister = 2;
template <>
inline constexpr int kPerRegister<TFloat> = 1;

template <class T>
float operand_element(uint32_t bits, int i) {
  return widen(T{static_cast<uint16_t>(bits >> 16 * i)});
}
template <>
inline float operand_element<TFloat>(uint32_t bits, int) {
  const float value = bits_as<float>(bits);
  if (bits != round_to_tf32(value)) throw Error("an operand that was not rounded to TF32");
  return value;
}

// mma.m16n8: d = a * b + c, 16 x kDepth times kDepth x 8. "Matrix Fragments for mma.m16n8k4 / m16n8k8 / m16n8k16", with
// group = lane / 4 and member = lane % 4:
//   a: register i has row group (+ 8 for odd i), and columns from kPerRegister * member + i / 2 * (4 * kPerRegister)
//   on; b: register i has column group, and rows from kPerRegister * member + i * (4 * kPerRegister) on; c, d: register
//   i is row group (+ 8 for i >= 2), column 2 * member + i % 2.
// Sums are exact here but for the last rounding; a card's, whose order and precision are not specified, are near.
template <class T, int kDepth>
void multiply_matrices(Warp& warp, const Instruction& x, uint32_t lanes) {
  require_whole(lanes, kAllLanes);
  constexpr int kPer = kPerRegister<T>, kRegistersB = kDepth / (4 * kPer), kRegistersA = 2 * kRegistersB;
  float a[16][kDepth], b[kDepth][8];
  double sums[16][8];
  const Operand* const d = x.operands.data();
  const Operand *const from_a = d + 4, *const from_b = from_a + kRegistersA, *const c = from_b + kRegistersB;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < kRegistersA; ++i) {
      const uint32_t bits = warp.row<uint32_t>(from_a[i])[lane];
      for (int e = 0; e < kPer; ++e) {
        a[group + i % 2 * 8][kPer * member + e + i / 2 * (4 * kPer)] = operand_element<T>(bits, e);
      }
    }
    for (int i = 0; i < kRegistersB; ++i) {
      const uint32_t bits = warp.row<uint32_t>(from_b[i])[lane];
      for (int e = 0; e < kPer; ++e) b[kPer * member + e + i * (4 * kPer)][group] = operand_element<T>(bits, e);
    }
    for (int i = 0; i < 4; ++i) sums[group + i / 2 * 8][2 * member + i % 2] = warp.row<float>(c[i])[lane];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += static_cast<double>(a[row][k]) * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      warp.row<float>(d[i])[lane] = static_cast<float>(sums[group + i / 2 * 8][2 * member + i % 2]);
    }
  }
}

}  // namespace ptx
