// The kernels of a stem's training, written once over Simd<A>; see stem_training_table.h.
#pragma once

#include "stem.h"
#include "stem_training_table.h"
#include "training.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// The gradient of a max pool of values that are at least 0, behind a ReLU. Whatever lies outside of the plane is a 0:
// it is the largest only where all are, and then the ReLU lets nothing pass. Of the nine of a window the largest of
// each row is found first, which two windows share, then the largest of the rows; from there the gradient goes the same
// way back. Even and odd columns are apart, so that a window's columns are lanes of the same number.
template <class A>
class MaxPoolBackward {
  using S = Simd<A>;
  using V = typename S::V;

  // A row of values, and what it gets of the gradient, window by window.
  struct Row {
    A *even, *odd, *largest, *gradient;
  };

 public:
  MaxPoolBackward(const Stem& stem, Arena& arena) : width_(stem.conv_width()), windows_((width_ + 1) / 2) {
    const Planes<A> planes = arena.planes<A>(4 * kPoolRows + 1, windows_);
    for (int64_t i = 0; i < kPoolRows; ++i) {
      const Planes<A> own = planes.from(4 * i);
      rows_[i] = {own.channel(0), own.channel(1), own.channel(2), own.channel(3)};
    }
    left_ = planes.channel(4 * kPoolRows);
  }

  PlaneSums run(const Stem& stem, const PlaneNorm& of_plane, const A* result_gradient, const A* y, A* gradient) {
    const int64_t height = stem.conv_height();
    const NormAndRelu<A> norm(of_plane.scale, of_plane.shift);
    const V broadcast = S::broadcast(static_cast<A>(of_plane.mean));
    V sum = {}, times_y = {};
    const auto finish = [&](const Row& row, int64_t number) {
      finish_row(row, broadcast, y + number * width_, gradient + number * width_, sum, times_y);
    };
    Row above = rows_[0], middle = rows_[1], below = rows_[2];
    clear(above);
    for (int64_t i = 0; i < stem.out_height(); ++i) {
      const int64_t row = 2 * i;
      read(norm, y + row * width_, middle);
      if (row + 1 < height) {
        read(norm, y + (row + 1) * width_, below);
      } else {
        clear(below);
      }
      hand_back(result_gradient + i * windows_, above, middle, below);
      if (row > 0) finish(above, row - 1);
      finish(middle, row);
      std::swap(above, below);
    }
    if (height % 2 == 0) finish(above, height - 1);
    return {static_cast<double>(S::sum(sum)), static_cast<double>(S::sum(times_y))};
  }

 private:
  // Whether the later of two values is the one that a scan keeps: all bits of a lane set, or none.
  static auto is_later(V first, V later) { return (later > first) | (later != later); }

  void clear(const Row& row) const {
    for (A* const each : {row.even, row.odd, row.largest, row.gradient}) std::fill_n(each, windows_, A{0});
  }

  // Some columns' values, zeros outside of the plane.
  V values(const NormAndRelu<A>& norm, const A* y, int64_t column) const {
    const int64_t n = width_ - column;
    const V value = norm(load_first(y + column, n));
    return n >= S::kLanes ? value : S::keep(value, S::first(std::max<int64_t>(0, n)));
  }

  void read(const NormAndRelu<A>& norm, const A* y, const Row& row) const {
    V odd_before = {};
    for (int64_t i = 0; i < windows_; i += S::kLanes) {
      const V first = values(norm, y, 2 * i), second = values(norm, y, 2 * i + S::kLanes);
      const V even = S::even(first, second), odd = S::odd(first, second), left = S::shift_in(odd_before, odd);
      const V of_two = is_later(left, even) ? even : left;
      S::store(row.even + i, even);
      S::store(row.odd + i, odd);
      S::store(row.largest + i, is_later(of_two, odd) ? odd : of_two);
      odd_before = odd;
    }
  }

  // Gives a row of the result's gradient to the rows that its windows have their largest values in.
  void hand_back(const A* result_gradient, const Row& above, const Row& middle, const Row& below) const {
    for (int64_t i = 0; i < windows_; i += S::kLanes) {
      const V gradient = load_first(result_gradient + i, windows_ - i);
      const V first = S::load(above.largest + i), second = S::load(middle.largest + i);
      const auto is_second = is_later(first, second);
      const auto is_third = is_later(is_second ? second : first, S::load(below.largest + i));
      const V of_two = is_third ? V{} : gradient;
      S::store(above.gradient + i, S::load(above.gradient + i) + (is_second ? V{} : of_two));
      S::store(middle.gradient + i, is_second ? of_two : V{});
      S::store(below.gradient + i, is_third ? gradient : V{});
    }
  }

  // Gives a row's gradient to the columns, and adds it up.
  void finish_row(const Row& row, V mean, const A* y, A* to, V& sum, V& times_y) const {
    V odd_before = {};
    for (int64_t i = 0; i < windows_; i += S::kLanes) {
      const V gradient = S::load(row.gradient + i), even = S::load(row.even + i), odd = S::load(row.odd + i);
      const V left = S::shift_in(odd_before, odd);
      odd_before = odd;
      const auto is_even = is_later(left, even);
      const auto is_odd = is_later(is_even ? even : left, odd);
      const V of_two = is_odd ? V{} : gradient;
      S::store(left_ + i, is_even ? V{} : of_two);
      S::store(row.even + i, relu_passes(even, is_even ? of_two : V{}));
      S::store(row.gradient + i, is_odd ? gradient : V{});
    }
    S::store(left_ + ceil_div(windows_, S::kLanes) * S::kLanes, V{}, S::first(1));
    for (int64_t i = 0; i < windows_; i += S::kLanes) {
      const V even = S::load(row.even + i);
      // A window's left column is the odd one of the window before.
      const V odd = relu_passes(S::load(row.odd + i), S::load(row.gradient + i) + S::load(left_ + i + 1));
      const V halves[2] = {S::first_in_turn(even, odd), S::last_in_turn(even, odd)};
      unrolled<2>([&](int half) {
        const int64_t column = 2 * i + half * S::kLanes, left = width_ - column;
        sum += halves[half];
        times_y = S::fma(halves[half], load_first(y + column, left) - mean, times_y);
        store_first(to + column, halves[half], left);
      });
    }
  }

  int64_t width_, windows_;
  Row rows_[kPoolRows];
  A* left_;
};

// Some channels' gradients by some taps: their sums, a vector each, stay in registers.
template <class A>
struct TapProducts {
  Planes<const A> gradient;
  const A* taps;
  const int64_t* offsets;  // to the pixels of each tap
  int64_t pixels;
  typename Simd<A>::V* sums;  // to which the products are added
  int64_t sums_row;
};

template <class A, int Rows, int Columns>
void add_tap_products(const TapProducts<A>& given) {
  const TapProducts<A> p = given;  // a copy that no store can alias
  using S = Simd<A>;
  using V = typename S::V;
  V sum[Rows][Columns];
  unrolled<Rows, Columns>([&](int row, int column) { sum[row][column] = p.sums[row * p.sums_row + column]; });
  const A *gradients[Rows], *taps[Columns];
  unrolled<Rows>([&](int row) { gradients[row] = p.gradient.channel(row); });
  unrolled<Columns>([&](int column) { taps[column] = p.taps + p.offsets[column]; });
  each_vector<A>(p.pixels, [&](int64_t i, int64_t n, auto is_tail) __attribute__((always_inline)) {
    V columns[Columns];
    unrolled<Columns>([&](int column) { columns[column] = load_pixels(taps[column] + i, n, is_tail); });
    unrolled<Rows>([&](int row) {
      const V value = load_pixels(gradients[row] + i, n, is_tail);
      unrolled<Columns>([&](int column) { sum[row][column] = S::fma(value, columns[column], sum[row][column]); });
    });
  });
  unrolled<Rows, Columns>([&](int row, int column) { p.sums[row * p.sums_row + column] = sum[row][column]; });
}

template <class A>
using TapProductsFunction = void (*)(const TapProducts<A>&);

template <class A, int... I>
constexpr std::array<TapProductsFunction<A>, sizeof...(I)> tap_products_functions(std::integer_sequence<int, I...>) {
  return {add_tap_products<A, I / kTileVectors + 1, I % kTileVectors + 1>...};
}

template <class T>
class StemTrainingOf final : public StemTrainingKernel {
 public:
  using A = accumulator_t<T>;
  using S = Simd<A>;
  using V = typename S::V;

  int64_t plane_bytes(const Stem& stem) const override {
    Arena arena(nullptr);
    MaxPoolBackward<A>(stem, arena);
    return arena.bytes();
  }

  void norm_and_pool(const Stem& stem, const PlaneNorm& norm, const void* from, void* to, void* memory) const override {
    const auto* y = static_cast<const A*>(from);
    auto* result = static_cast<A*>(to);
    const NormAndRelu<A> applied(norm.scale, norm.shift);
    const int64_t width = stem.conv_width(), height = stem.conv_height();
    Arena arena(memory);
    const Planes<A> rows = arena.planes<A>(kPoolRows, width);
    A *above = rows.channel(0), *middle = rows.channel(1), *below = rows.channel(2);
    for (int64_t row = 0; row < height; row += 2, result += stem.out_width()) {
      applied.of_plane(y + row * width, width, middle);
      const bool has_below = row + 1 < height;
      if (has_below) applied.of_plane(y + (row + 1) * width, width, below);
      max_pool_row<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, A>(
          stem, {row > 0 ? above : middle, middle, has_below ? below : middle}, result);
      std::swap(above, below);
    }
  }

  PlaneSums norm_and_pool_backward(const Stem& stem, const PlaneNorm& norm, const void* result_gradient,
                                   const void* from, void* to, void* memory) const override {
    Arena arena(memory);
    return MaxPoolBackward<A>(stem, arena)
        .run(stem, norm, static_cast<const A*>(result_gradient), static_cast<const A*>(from), static_cast<A*>(to));
  }

  int64_t products_bytes(const Stem& stem) const override { return ProductsWorkspace(stem, nullptr).bytes; }

  void products(const Stem& given, const StemProducts& p, void* memory) const override {
    static constexpr auto functions =
        tap_products_functions<A>(std::make_integer_sequence<int, kTileChannels * kTileVectors>{});
    const Stem stem = without_pool(given);
    const ProductsWorkspace own(stem, memory);
    StemTaps<T> taps(stem, static_cast<const T*>(p.image), own.stem, p.rows.begin);
    taps.offsets(own.stem.lists.offsets);
    const int64_t width = stem.conv_width(), plane = stem.conv_height() * width, count = stem.taps();
    std::fill_n(own.sums, stem.out_channels * count, V{});
    for (int64_t row = p.rows.begin, end; row < p.rows.end; row = end) {
      end = std::min(p.rows.end, row + rows_at_once(stem));
      taps.move_to(row, end);
      const int64_t pixels = (end - row) * width;
      for (int64_t c = 0; c < stem.out_channels; ++c) {
        const int64_t at = c * plane + row * width;
        of_y(p.norms[c], static_cast<const A*>(p.y) + at, static_cast<const A*>(p.gradient) + at, pixels,
             own.gradient.channel(c));
      }
      for (int64_t c = 0; c < stem.out_channels; c += kTileChannels) {
        const int64_t rows = std::min<int64_t>(kTileChannels, stem.out_channels - c);
        for (int64_t tap = 0; tap < count; tap += kTileVectors) {
          const int64_t columns = std::min<int64_t>(kTileVectors, count - tap);
          functions[(rows - 1) * kTileVectors + columns - 1](
              {read_only(own.gradient.from(c)), own.stem.taps.data, own.stem.lists.offsets + tap, pixels,
               own.sums + c * count + tap, count});
        }
      }
    }
    for (int64_t i = 0; i < stem.out_channels * count; ++i) p.sums[i] = S::sum(own.sums[i]);
  }

 private:
  struct ProductsWorkspace {
    ProductsWorkspace(const Stem& stem, void* memory) : stem(without_pool(stem), memory), bytes(this->stem.bytes) {
      Arena arena(memory ? static_cast<char*>(memory) + bytes : nullptr);
      gradient = arena.planes<A>(stem.out_channels, rows_at_once(without_pool(stem)) * stem.conv_width());
      sums = arena.take<V>(stem.out_channels * stem.taps());
      bytes += arena.bytes();
    }
    StemWorkspace<T> stem;
    Planes<A> gradient;  // of y
    V* sums;
    int64_t bytes;
  };

  static Stem without_pool(Stem stem) {
    stem.max_pool = false;
    return stem;
  }

  // The gradient of y from that of the norm's results. A frozen norm, whose slope is 0, has nothing to do with y, which
  // may not be finite.
  static void of_y(const TrainingKernel::NormBackward& n, const A* y, const A* gradient, int64_t pixels, A* to) {
    const V scale = S::broadcast(static_cast<A>(n.scale)), slope = S::broadcast(static_cast<A>(n.slope));
    const V mean = S::broadcast(static_cast<A>(n.mean)), shift = S::broadcast(static_cast<A>(n.shift));
    const bool is_frozen = n.slope == 0;
    each_vector<A>(pixels, [&](int64_t i, int64_t left, auto is_tail) {
      const V deviation = is_frozen ? V{} : load_pixels(y + i, left, is_tail) - mean;
      const V scaled = scale * load_pixels(gradient + i, left, is_tail) - shift;
      S::store(to + i, scaled - slope * deviation);
    });
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
