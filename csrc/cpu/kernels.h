// The interface between the op (which splits work over threads) and the kernels (compiled once per ISA).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../network.h"

namespace shufflenet::cpu {

// Some rows of the result.
struct Part {
  int64_t row_begin = 0, row_end = 0;
};

struct Channels {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// Planes of the accumulator type: channel c starts plane elements behind channel c - 1.
struct RowsOfImage {
  void* data = nullptr;
  int64_t plane = 0;
};

// A part that does not compute the rows of y1 around it, but has them from the parts above and below: their rows of x
// and of y1 are the rows of the result times the stride, and no two parts share a row.
struct Strip {
  Part part;
  RowsOfImage x, result;  // from the part's own first row
  RowsOfImage x_above;    // the row of x above; null: there is none
  void* y1 = nullptr;     // of strip_bytes
  const Strip* above = nullptr;
  const Strip* below = nullptr;
};

// What a pointwise convolution computes at once: so many channels of so many vectors of pixels.
struct Tile {
  int64_t channels = 0, vectors = 0;
};

// The phases of a part, in the order in which they run: each needs all channels of the one before, and its own channels
// may be split in any way, over any threads. No result depends on the splits, bit for bit.
struct UnitKernel {
  int64_t (*buffer_bytes)(const Unit&, const Part&);  // of what the phases hand on to each other
  // Channels of x; without effect where x can be read in place.
  bool (*is_staged)(const Unit&);
  void (*stage)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers);
  // Of a worker, for so many intermediate channels; project needs that of none.
  int64_t (*scratch_bytes)(const Unit&, const Part&, Channels);
  // Intermediate channels, in shuffled order.
  void (*expand)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers, void* scratch);
  // Channels of the result; no such phase in a unit that ends after the depthwise convolution.
  void (*project)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers, void* scratch);

  // The same phases of strips, for contiguous images of the accumulator type: the second needs the first of the strips
  // above and below.
  int64_t (*strip_bytes)(const Unit&, const Part&);
  int64_t (*strip_scratch_bytes)(const Unit&, const Part&);
  void (*expand_strip)(const Unit&, const UnitPointers&, const Strip&, void* scratch);
  void (*project_strip)(const Unit&, const UnitPointers&, const Strip&, void* scratch);

  // The largest tile for so many channels that share their inputs, and for the plane's last pixels.
  Tile (*tile)(int64_t channels, int64_t pixels, int64_t plane);

  // Converts n elements of the dtype to the accumulator type.
  void (*to_accumulator)(const void* from, void* to, int64_t n);
};

// A network's stem and head. Planes and means are of the accumulator type.
struct NetworkKernel {
  int64_t (*stem_scratch_bytes)(const Stem&, int64_t row_begin, int64_t row_end);
  // Rows of the result of an image; result_plane elements lie between its planes.
  void (*stem)(const Stem&, const Convolution&, const void* image, int64_t row_begin, int64_t row_end, void* result,
               int64_t result_plane, void* scratch);
  Tile (*stem_tile)(const Stem&, int64_t row_begin, int64_t row_end);
  void (*window_means)(const Head&, const void* x, int64_t x_plane, Channels, void* means);
  void (*linear)(const Head&, const Convolution&, const void* means, int64_t images, Channels classes, void* result);

  // Does so many rounds of multiply-adds in registers, the fastest that the ISA can, and returns how many they were.
  int64_t (*multiply_add)(int64_t rounds);
};

inline constexpr int64_t kScratchAlignment = 64;  // of buffers and scratch, in bytes

struct Isa {
  const char* name;
  bool (*usable)();                  // on this processor
  UnitKernel (*unit_kernel)(Dtype);  // Dtype's accumulator is double for float64, float for all others
  NetworkKernel (*network_kernel)(Dtype);
  int64_t vector_bytes;
};

// The instruction sets that the library was compiled for and that this processor has, the most capable last.
std::vector<std::string> usable_isas();

// The ISA in use: the most capable, or what SHUFFLENET_EXT_CPU_ISA or select_isa named.
const Isa& isa();
void select_isa(const std::string& name);

}  // namespace shufflenet::cpu
