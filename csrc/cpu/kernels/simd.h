// Vectors of the accumulator type A, and conversion of the stored dtypes to and from them. Written once over the few
// Intrinsics that an ISA's header in isa/ has; SHUFFLENET_ISA names its namespace, so that no inline function compiled
// for one ISA can be picked by the linker for another.
#pragma once

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Calls f(0) to f(N - 1) without a loop, so that what f indexes can stay in registers.
template <int N, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) f(i);
}
// Calls f(0, 0), f(0, 1) to f(M - 1, N - 1) in the same way.
template <int M, int N, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
  unrolled<M>([&](int i) __attribute__((always_inline)) { unrolled<N>([&](int j) { f(i, j); }); });
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct Simd : Intrinsics<A> {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  typedef A V __attribute__((vector_size(kVectorBytes)));
  using typename Intrinsics<A>::Mask;
  using Intrinsics<A>::load;
  using Intrinsics<A>::store;

  static V broadcast(A value) { return value - V{}; }
  static V load(const A* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(A* p, V v) { std::memcpy(p, &v, sizeof v); }

  static constexpr uint32_t kAllBits = (uint64_t{1} << kLanes) - 1;
  static constexpr uint32_t first_bits(int64_t n) { return n >= kLanes ? kAllBits : (uint32_t{1} << n) - 1; }
  static Mask first(int64_t n) { return Intrinsics<A>::mask(first_bits(n)); }

  // Adds by halves, so as deep as the logarithm of the lanes.
  static A sum(V v) { return sum_of_first<kLanes>(v); }

  // Every second element of the 2 * kLanes elements of a and b.
  static V even(V a, V b) { return picked<2, 0>(a, b, kEach); }
  static V odd(V a, V b) { return picked<2, 1>(a, b, kEach); }

  // The lanes of v moved up by one, the last lane of `before` in the first.
  static V shift_in(V before, V v) { return picked<1, kLanes - 1>(before, v, kEach); }

  // The elements of a and b in turn, a's first: those of their first halves, and those of their last.
  static V first_in_turn(V a, V b) { return interleave<0>(a, b, kEach); }
  static V last_in_turn(V a, V b) { return interleave<kLanes / 2>(a, b, kEach); }

  // Transposes a kLanes x kLanes block held as one vector a row: log2(kLanes) rounds, each of which merges the rows
  // i and i + kLanes / 2 element by element.
  static void transpose(V (&rows)[kLanes]) {
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
      V merged[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes / 2; ++i) {
        merged[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], kEach);
        merged[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], kEach);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = merged[i];
    }
  }

 private:
  static constexpr auto kEach = std::make_integer_sequence<int, kLanes>{};

  template <int N>
  static A sum_of_first(V v) {
    if constexpr (N == 1) {
      return v[0];
    } else {
      return sum_of_first<N / 2>(v + picked<1, N / 2>(v, v, kEach));
    }
  }
  // Elements First, First + Step, First + 2 * Step, … of the 2 * kLanes elements of a and b.
  template <int Step, int First, int... I>
  static V picked(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (First + Step * I)...);
  }
  template <int First, int... I>
  static V interleave(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (First + I / 2 + (I % 2) * kLanes)...);
  }
};

// Loads and stores kLanes elements of a stored dtype T as a vector of its accumulator type. The 16-bit types convert by
// integer arithmetic, rounding to nearest even as torch does.
template <class T>
struct Stored {
  using A = accumulator_t<T>;
  using V = typename Simd<A>::V;
  static V load(const T* p) { return Simd<A>::load(p); }
  static void store(T* p, V v) { Simd<A>::store(p, v); }
};

template <class T>
struct Stored16 {
  static constexpr int kLanes = Simd<float>::kLanes;
  using V = Simd<float>::V;
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));

  static V load(const T* p) {
    Half half;
    std::memcpy(&half, p, sizeof half);
    return Stored<T>::widen(__builtin_convertvector(half, Word));
  }
  static void store(T* p, V v) {
    const Half half = __builtin_convertvector(Stored<T>::narrow(v), Half);
    std::memcpy(p, &half, sizeof half);
  }
};

template <>
struct Stored<BFloat16> : Stored16<BFloat16> {
  static V widen(Word half) { return reinterpret_cast<V>(half << 16); }
  static Word narrow(V v) {
    const Word word = reinterpret_cast<Word>(v);
    const Word rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return (word & 0x7fffffff) > 0x7f800000 ? Word{} + 0x7fc0 : rounded;
  }
};

template <>
struct Stored<Float16> : Stored16<Float16> {
  static V widen(Word half) {
    const Word sign = (half & 0x8000) << 16;
    // The exponent's bias is 15 in float16 and 127 in float: a product with 2^112 corrects it, subnormals included.
    const V magnitude = reinterpret_cast<V>((half & 0x7fff) << 13) * 0x1p112f;
    const Word bits = reinterpret_cast<Word>(magnitude);
    const Word infinite_or_nan = (half & 0x7c00) == 0x7c00 ? Word{} + 0x7f800000 : Word{};
    return reinterpret_cast<V>(bits | infinite_or_nan | sign);
  }
  static Word narrow(V v) {
    const Word word = reinterpret_cast<Word>(v);
    const Word sign = (word >> 16) & 0x8000;
    const Word magnitude = word & 0x7fffffff;
    const Word normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 leaves a subnormal float16, rounded, in the low bits of the sum.
    const Word subnormal = reinterpret_cast<Word>(reinterpret_cast<V>(magnitude) + 0.5f) - 0x3f000000;
    const Word infinite_or_nan = magnitude > 0x7f800000 ? Word{} + 0x7e00 : Word{} + 0x7c00;
    const Word finite = magnitude < 0x38800000 ? subnormal : normal;
    return sign | (magnitude >= 0x47800000 ? infinite_or_nan : finite);
  }
};

// Loads n elements, or as many as a vector holds, and zeros behind them.
template <class T>
typename Stored<T>::V load_first(const T* p, int64_t n) {
  using S = Simd<accumulator_t<T>>;
  if (n >= S::kLanes) return Stored<T>::load(p);
  if (n <= 0) return typename Stored<T>::V{};
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    return S::load(p, S::first(n));
  } else if constexpr (kMasksHalves) {
    return Stored<T>::widen(__builtin_convertvector(S::load_halves(p, S::first(n)), typename Stored<T>::Word));
  } else {
    T buffer[S::kLanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return Stored<T>::load(buffer);
  }
}

template <class T>
void store_first(T* p, typename Stored<T>::V v, int64_t n) {
  using S = Simd<accumulator_t<T>>;
  if (n >= S::kLanes) return Stored<T>::store(p, v);
  if (n <= 0) return;
  if constexpr (std::is_same_v<T, accumulator_t<T>>) {
    S::store(p, v, S::first(n));
  } else if constexpr (kMasksHalves) {
    S::store_halves(p, __builtin_convertvector(Stored<T>::narrow(v), typename Stored<T>::Half), S::first(n));
  } else {
    T buffer[S::kLanes];
    Stored<T>::store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
