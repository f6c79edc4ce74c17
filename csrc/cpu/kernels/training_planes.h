// What the kernels of training do with single planes, of a stored dtype T, computing in its accumulator type.
#pragma once

#include "planes.h"
#include "training_table.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Calls step(pixel, n, is_tail) for each vector of so many pixels, of which n are there. Only the last one may be a
// tail, with fewer than a vector holds.
template <class A, class Step>
inline void each_vector(int64_t pixels, const Step& step) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t pixel = 0;
  for (; pixel + kLanes <= pixels; pixel += kLanes) step(pixel, kLanes, std::false_type{});
  if (pixel < pixels) step(pixel, pixels - pixel, std::true_type{});
}

// Loads n pixels, and zeros behind them.
template <class T, class IsTail>
inline typename Stored<T>::V load_pixels(const T* p, int64_t n, IsTail) {
  return IsTail::value ? load_first(p, n) : Stored<T>::load(p);
}

template <class T, class IsTail>
inline void store_pixels(T* p, typename Stored<T>::V v, int64_t n, IsTail) {
  if (IsTail::value) {
    store_first(p, v, n);
  } else {
    Stored<T>::store(p, v);
  }
}

// Copies a plane to one of another dtype.
template <class From, class To>
void copy_plane(const From* from, int64_t pixels, To* to) {
  each_vector<accumulator_t<From>>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
    store_pixels(to + i, load_pixels(from + i, n, is_tail), n, is_tail);
  });
}

// Has a plane computed where it lies; or, where it is of 16 bits, in memory that is given, from where it is converted.
template <class T, class Compute>
void write_plane(T* to, int64_t pixels, accumulator_t<T>* memory, const Compute& compute) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    compute(to);
  } else {
    compute(memory);
    copy_plane(memory, pixels, to);
  }
}

// A plane as it lies; or, where it is of 16 bits, a copy of it in memory that is given.
template <class T>
const accumulator_t<T>* read_plane(const T* from, int64_t pixels, accumulator_t<T>* memory) {
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    return from;
  } else {
    copy_plane(from, pixels, memory);
    return memory;
  }
}

// Writes to[column][row], a block of as many rows and columns as a vector has lanes at a time.
template <class T>
void transpose_matrix(const MatrixRows& from, T* to, int64_t to_row) {
  using S = Simd<accumulator_t<T>>;
  for (int64_t row = 0; row < from.rows; row += S::kLanes) {
    const int64_t rows = std::min<int64_t>(S::kLanes, from.rows - row);
    for (int64_t column = 0; column < from.columns; column += S::kLanes) {
      const int64_t columns = std::min<int64_t>(S::kLanes, from.columns - column);
      const T* const block = static_cast<const T*>(from.data) + row * from.row + column;
      T* const turned = to + column * to_row + row;
      typename S::V vectors[S::kLanes] = {};
      if (rows == S::kLanes && columns == S::kLanes) {
        unrolled<S::kLanes>([&](int i) { vectors[i] = Stored<T>::load(block + i * from.row); });
        S::transpose(vectors);
        unrolled<S::kLanes>([&](int i) { Stored<T>::store(turned + i * to_row, vectors[i]); });
      } else {
        for (int64_t i = 0; i < rows; ++i) vectors[i] = load_first(block + i * from.row, columns);
        S::transpose(vectors);
        for (int64_t i = 0; i < columns; ++i) store_first(turned + i * to_row, vectors[i], rows);
      }
    }
  }
}

// A norm and the ReLU behind it.
template <class A>
class NormAndRelu {
  using S = Simd<A>;
  using V = typename S::V;

 public:
  NormAndRelu(double scale, double shift)
      : scale_(S::broadcast(static_cast<A>(scale))), shift_(S::broadcast(static_cast<A>(shift))) {}
  V operator()(V y) const { return S::max(V{}, S::fma(y, scale_, shift_)); }
  template <class From, class To>
  void of_plane(const From* y, int64_t pixels, To* to) const {
    each_vector<A>(pixels, [&](int64_t i, int64_t n, auto is_tail) {
      store_pixels(to + i, (*this)(load_pixels(y + i, n, is_tail)), n, is_tail);
    });
  }

 private:
  V scale_, shift_;
};

// The gradient where a ReLU's result is above zero. Where it is NaN it passes, as in PyTorch.
template <class V>
inline V relu_passes(V result, V gradient) {
  return result <= V{} ? V{} : gradient;
}

// A plane with a row of zeros above and one below, for the taps of a 3x3 window with stride 1.
template <class A>
class PaddedPlane {
 public:
  PaddedPlane(Arena& arena, PlaneSize size)
      : size_(size), rows_(arena.planes<A>(1, (size.height + 2) * size.width).data) {}

  const A* from_row_above() const { return rows_; }
  A* plane() const { return rows_ + size_.width; }
  void clear_rows_outside() const {
    std::fill_n(rows_, size_.width, A{0});
    std::fill_n(plane() + size_.pixels(), size_.width, A{0});
  }

  // Puts the pixels of a plane of half the size, times their factors, to the even rows and columns, zeros elsewhere:
  // a convolution with stride 2 backwards is then one with stride 1. Only the first and the last column's factor may
  // differ from the others'.
  template <class Factor>
  void spread(const A* from, PlaneSize half, const Factor& factor) const {
    using S = Simd<A>;
    const int64_t last = half.width - 1;
    for (int64_t row = 0; row < half.height; ++row, from += half.width) {
      A* const to = plane() + 2 * row * size_.width;
      const typename S::V none = {}, between = S::broadcast(factor(row, std::min<int64_t>(1, last)));
      for (int64_t i = 0; i < half.width; i += S::kLanes) {
        const auto values = load_first(from + i, half.width - i) * between;
        store_first(to + 2 * i, S::first_in_turn(values, none), size_.width - 2 * i);
        store_first(to + 2 * i + S::kLanes, S::last_in_turn(values, none), size_.width - 2 * i - S::kLanes);
      }
      to[0] = from[0] * factor(row, 0);
      to[2 * last] = from[last] * factor(row, last);
      if (2 * row + 1 < size_.height) std::fill_n(to + size_.width, size_.width, A{0});
    }
  }

 private:
  PlaneSize size_;
  A* rows_;
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
