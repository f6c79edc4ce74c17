// Products of pairs by AMX, whose tiles are 16 rows of 64 bytes: weights as they lie are tiles of 16 x 32, and 16
// pixels of 16 pairs, from planes, are tiles as well.
#pragma once

#include "../kernels/pairs.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

inline constexpr int64_t kTileRows = 16;
// Four sums are on their way at a time: each multiplication takes as long as three others take to start.
inline constexpr int64_t kProductRows = kTileRows, kProductVectors = 4;
inline constexpr int64_t kSumsStride = kProductVectors * Simd<float>::kLanes;

class Products {
 public:
  static constexpr bool kTakesLonePixels = false;  // a tile has 16 pixels at least

  Products() = default;
  Products(const Products&) = delete;
  ~Products() {
    if (rows_ != 0) _tile_release();  // else the system would save the tiles with each switch of threads
  }

  // Prepares products of so many rows and pairs. Tiles 0 to 3 are sums, 4 and 5 the weights and pixels of 16 pairs, 6
  // and 7 those of the pairs that are left.
  void prepare(int64_t rows, int64_t pairs) {
    const int64_t left = pairs % kTileRows;
    if (rows == rows_ && left == left_) return;
    rows_ = rows;
    left_ = left;
    Shapes shapes;
    for (int sum = 0; sum < kProductVectors; ++sum) shapes.set(sum, rows, 64);
    shapes.set(4, rows, 64);
    shapes.set(5, kTileRows, 64);
    if (left > 0) {
      shapes.set(6, rows, 4 * left);
      shapes.set(7, left, 64);
    }
    // The intrinsic lets GCC 12 believe that only the first bytes are read.
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }

  void run(const PairProduct& product) {
    std::atomic_signal_fence(std::memory_order_seq_cst);  // nor does it know what the tiles' loads read
    switch (product.vectors) {
      case 1: return run<1>(product);
      case 2: return run<2>(product);
      case 3: return run<3>(product);
      default: return run<4>(product);
    }
  }

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
    void set(int tile, int64_t tile_rows, int64_t row_bytes) {
      rows[tile] = static_cast<uint8_t>(tile_rows);
      bytes[tile] = static_cast<uint16_t>(row_bytes);
    }
  };

  // The numbers of tiles must be literals, so what is done for each sum is written by a macro.
#define SHUFFLENET_EACH_SUM(DO) \
  DO(0);                        \
  if constexpr (Vectors > 1) {  \
    DO(1);                      \
  }                             \
  if constexpr (Vectors > 2) {  \
    DO(2);                      \
  }                             \
  if constexpr (Vectors > 3) {  \
    DO(3);                      \
  }
#define SHUFFLENET_ZERO(i) _tile_zero(i)
#define SHUFFLENET_ADD(i, weights, pixels)      \
  _tile_loadd(pixels, x + i * kLanes, x_bytes); \
  _tile_dpbf16ps(i, weights, pixels)
#define SHUFFLENET_ADD_PRODUCT(i) SHUFFLENET_ADD(i, 4, 5)
#define SHUFFLENET_ADD_LEFT_PRODUCT(i) SHUFFLENET_ADD(i, 6, 7)
#define SHUFFLENET_STORE(i) _tile_stored(i, p.sums + i * kLanes, kSumBytes)
  template <int Vectors>
  static void run(const PairProduct& p) {
    constexpr int64_t kLanes = Simd<float>::kLanes, kSumBytes = 4 * kSumsStride;
    const int64_t weight_bytes = 4 * p.pairs, x_bytes = 4 * p.x_plane;
    const BFloat16* weight = p.weight;
    const Pair* x = p.x;
    SHUFFLENET_EACH_SUM(SHUFFLENET_ZERO);
    int64_t left = p.pairs;
    for (; left >= kTileRows; left -= kTileRows, weight += 2 * kTileRows, x += kTileRows * p.x_plane) {
      _tile_loadd(4, weight, weight_bytes);
      SHUFFLENET_EACH_SUM(SHUFFLENET_ADD_PRODUCT);
    }
    if (left > 0) {
      _tile_loadd(6, weight, weight_bytes);
      SHUFFLENET_EACH_SUM(SHUFFLENET_ADD_LEFT_PRODUCT);
    }
    SHUFFLENET_EACH_SUM(SHUFFLENET_STORE);
  }
#undef SHUFFLENET_EACH_SUM
#undef SHUFFLENET_ZERO
#undef SHUFFLENET_ADD
#undef SHUFFLENET_ADD_PRODUCT
#undef SHUFFLENET_ADD_LEFT_PRODUCT
#undef SHUFFLENET_STORE

  int64_t rows_ = 0, left_ = 0;  // as prepared; 0: not yet
};

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
