// Small matrices in double, whose rows torch's threads share: what weights, batch norms and sums over the batch make of
// each other between the passes.
#pragma once

#include "tensors.h"

namespace shufflenet::cpu {

// Calls run(row) for each row of a matrix of so many columns, on torch's threads where it is large.
template <class Run>
void each_row(int64_t rows, int64_t columns, const Run& run) {
  constexpr int64_t kLeast = 8192;  // elements of a thread: what takes as long as to call it
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kLeast / columns), [&run](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

// The sum of term(0) to term(n - 1). It is four sums, as a single one would wait for each addition.
template <class Term>
double sum_of(int64_t n, const Term& term) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t j = 0; j < 4; ++j) sums[j] += term(i + j);
  }
  for (; i < n; ++i) sums[0] += term(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Turns matrices about, [groups][rows][columns] to [groups][columns][rows].
inline void transpose(const double* from, int64_t groups, int64_t rows, int64_t columns, double* to) {
  const TrainingKernel& kernel = isa().training(Dtype::float64);
  constexpr int64_t kColumns = 64;  // of a task
  const int64_t parts = ceil_div(columns, kColumns);
  each_task(groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, first = task % parts * kColumns, count = std::min(kColumns, columns - first);
    kernel.transpose(
        {from + group * rows * columns + first, rows, count, columns}, to + (group * columns + first) * rows, rows);
  });
}

// The right-hand sides of products of matrices, one for each group: [depth][columns], in rows of whole vectors.
class RightHandSides {
 public:
  // fill(row, to) writes the columns of a row; rows count through all groups.
  template <class Fill>
  RightHandSides(int64_t groups, int64_t depth, int64_t columns, const Fill& fill)
      : groups_(groups),
        depth_(depth),
        columns_(columns),
        row_size_(kernel_.product_row(columns)),
        data_(groups * depth * row_size_) {
    each_row(groups * depth, columns, [&](int64_t row) {
      double* const to = data_.data() + row * row_size_;
      fill(row, to);
      std::fill_n(to + columns, row_size_ - columns, 0.0);
    });
  }

  // Multiplies left-hand sides of so many rows a group: fill(row, to) writes the `depth` numbers of a row, and
  // take(row, numbers, products) gets them and their products with the columns.
  template <class Fill, class Take>
  void multiply(int64_t rows, const Fill& fill, const Take& take) const {
    constexpr int64_t kRows = 32;  // of a task
    const int64_t parts = ceil_div(rows, kRows);
    each_task(groups_ * parts, [&](int64_t task) {
      const int64_t group = task / parts, first = group * rows + task % parts * kRows;
      const int64_t count = std::min(kRows, (group + 1) * rows - first);
      auto* const left = reinterpret_cast<double*>(
          thread_workspace.reserve(count * (depth_ + row_size_) * static_cast<int64_t>(sizeof(double))));
      double* const products = left + count * depth_;
      for (int64_t i = 0; i < count; ++i) fill(first + i, left + i * depth_);
      std::fill_n(products, count * row_size_, 0.0);
      kernel_.products(
          {left, depth_, count, data_.data() + group * depth_ * row_size_, columns_, depth_, nullptr, products});
      for (int64_t i = 0; i < count; ++i) take(first + i, left + i * depth_, products + i * row_size_);
    });
  }

 private:
  const TrainingKernel& kernel_ = isa().training(Dtype::float64);
  int64_t groups_, depth_, columns_, row_size_;
  Matrix data_;
};

// The rows of a matrix as weights.
inline Weights weights_of(Dtype planes, Matrix matrix, int64_t depth) {
  const int64_t rows = static_cast<int64_t>(matrix.size()) / depth;
  Weights weights(planes, rows, depth);
  each_row(rows, depth, [&](int64_t row) { weights.round(row, matrix.data() + row * depth); });
  return weights;
}

}  // namespace shufflenet::cpu
