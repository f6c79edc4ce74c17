// The kernels on planes of pairs with dot products in plain C++, as a part of the fuzzer: so they are tested on
// processors too that have no dot products of bfloat16. Vectors are those of the baseline.
#include <cstdlib>

#include "../../csrc/cpu/isa/target.h"

#define SHUFFLENET_ISA baseline
#include "../../csrc/cpu/isa/baseline.h"
#include "../../csrc/cpu/kernels/simd.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

struct PairIntrinsics {
  using V = Simd<float>::V;
  static V pack(V first, V second) {
    return reinterpret_cast<V>(Stored<BFloat16>::narrow(first) | Stored<BFloat16>::narrow(second) << 16);
  }
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA

#include "../../csrc/cpu/kernels/pairs.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// An odd number of rows, so that pairs of rows lie in two tiles.
inline constexpr int64_t kProductRows = 3, kProductVectors = 2;
inline constexpr int64_t kSumsStride = (kProductVectors + 1) * Simd<float>::kLanes;

class Products {
 public:
  static constexpr bool kTakesLonePixels = true;

  void prepare(int64_t rows, int64_t pairs) {
    rows_ = rows;
    pairs_ = pairs;
  }

  void run(const PairProduct& p) {
    using S = Simd<float>;
    if (p.rows != rows_ || p.rows > kProductRows || p.pairs != pairs_ || p.vectors > kProductVectors) std::abort();
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t v = 0; v < p.vectors; ++v) {
        S::V sum = {};
        for (int64_t k = 0; k < p.pairs; ++k) {
          const S::V weights = Pairs::broadcast(p.weight + (row * p.pairs + k) * 2);
          const S::V pixels = Pairs::load(p.x + k * p.x_plane + v * S::kLanes);
          sum = S::fma(Pairs::first(weights), Pairs::first(pixels), sum);
          sum = S::fma(Pairs::second(weights), Pairs::second(pixels), sum);
        }
        S::store(p.sums + row * kSumsStride + v * S::kLanes, sum);
      }
    }
  }

  // The column ends with zeros to a whole vector.
  void run_pixel(const PairProduct& p, const Pair* column, int64_t place) {
    using S = Simd<float>;
    for (int64_t row = 0; row < p.rows; ++row) {
      S::V sum = {};
      for (int64_t k = 0; k < ceil_div(p.pairs, S::kLanes) * S::kLanes; k += S::kLanes) {
        const auto* const weights = reinterpret_cast<const float*>(p.weight + 2 * (row * p.pairs + k));
        const S::V w = load_first(weights, p.pairs - k), pixels = Pairs::load(column + k);
        sum = S::fma(Pairs::first(w), Pairs::first(pixels), sum);
        sum = S::fma(Pairs::second(w), Pairs::second(pixels), sum);
      }
      p.sums[row * kSumsStride + place] = S::sum(sum);
    }
  }

 private:
  int64_t rows_ = 0, pairs_ = 0;  // as prepared
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA

#include "../../csrc/cpu/kernels/pair_kernels.h"
#include "../../csrc/cpu/kernels/training_pairs.h"

namespace shufflenet::cpu {
namespace {

// Has nothing but kernels on pairs, and training in bfloat16.
class PlainPairs final : public Isa {
  const char* name() const override { return "plain pairs"; }
  bool is_usable() const override { return true; }
  const Kernels* pair_kernels(Dtype dtype) const override { return &baseline::pair_kernels(dtype); }
  const Kernels& kernels(Dtype) const override { std::abort(); }
  const TrainingKernel& training(Dtype) const override { return baseline::kPairTrainingKernels; }
  const StemTrainingKernel& stem_training(Dtype) const override { std::abort(); }
  void to_accumulator(Dtype, const void*, void*, int64_t) const override { std::abort(); }
  int64_t multiply_add(Dtype, int64_t) const override { std::abort(); }
};
constexpr PlainPairs kPlainPairs;

}  // namespace
extern const Isa& plain_pairs;
const Isa& plain_pairs = kPlainPairs;

}  // namespace shufflenet::cpu
