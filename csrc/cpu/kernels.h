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
  void* lent = nullptr;   // of lent_bytes: what the strips above and below need of y1
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
  int64_t element_bytes;         // of x and the result
  int64_t channels_per_element;  // 2: planes of pairs; see PairKernel

  // What phases may be split by: each share but the last is a multiple of this.
  int64_t (*expand_multiple)(const Unit&);
  int64_t project_multiple;

  int64_t (*buffer_bytes)(const Unit&, const Part&);  // of what the phases hand on to each other
  // Channels of x; without effect where x can be read in place.
  bool (*is_staged)(const Unit&);
  void (*stage)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers);
  // Of a worker, for so many intermediate channels; project needs that of none.
  int64_t (*scratch_bytes)(const Unit&, const Part&, Channels);
  // Rows of conv1; of PairKernel intermediate channels behind the shuffle, as pairs are made of those.
  void (*expand)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers, void* scratch);
  // Rows of conv3; where the unit ends after the depthwise convolution, channels of the result, if it is staged.
  void (*project)(const Unit&, const UnitPointers&, const Part&, Channels, void* buffers, void* scratch);

  // The same phases of strips, for contiguous images of the accumulator type: the second needs the first of the strips
  // above and below. The shortcut is pooled in the first, which has just read x.
  int64_t (*strip_bytes)(const Unit&, const Part&);
  int64_t (*lent_bytes)(const Unit&, const Part&);
  int64_t (*strip_scratch_bytes)(const Unit&, const Part&);
  void (*expand_strip)(const Unit&, const UnitPointers&, const Strip&, void* scratch);
  void (*project_strip)(const Unit&, const UnitPointers&, const Strip&, void* scratch);

  // The largest tile for so many channels that share their inputs, and for the plane's last pixels.
  Tile (*tile)(int64_t channels, int64_t pixels, int64_t plane);

  // Converts n elements of the dtype to the accumulator type.
  void (*to_accumulator)(const void* from, void* to, int64_t n);
};

struct StemKernel {
  int64_t element_bytes;         // of the result
  int64_t channels_per_element;  // 2: planes of pairs; see PairKernel
  int64_t (*scratch_bytes)(const Stem&);
  // Rows of the result of an image, the first of which goes to `result`; result_plane elements lie between its planes.
  void (*run)(const Stem&, const Convolution&, const void* image, int64_t row_begin, int64_t row_end, void* result,
              int64_t result_plane, void* scratch);
  Tile (*tile)(const Stem&);
};

// A network's stem and head. Planes and means are of the accumulator type.
struct NetworkKernel {
  StemKernel stem;
  void (*window_means)(const Head&, const void* x, int64_t x_plane, Channels, void* means);
  void (*linear)(const Head&, const Convolution&, const void* means, int64_t images, Channels classes, void* result);

  // Does so many rounds of multiply-adds in registers, the fastest that the ISA can, and returns how many they were.
  int64_t (*multiply_add)(int64_t rounds);
};

// How an image lies in a tensor.
struct TensorImage {
  Layout layout;
  int64_t channels, pixels;
};

// A program's steps in bfloat16. The images between them are planes of pairs, as dot products of bfloat16 take them:
// element i of plane c holds channels 2 c and 2 c + 1 at pixel i. Weights are bfloat16, in rows of an even depth (the
// depthwise convolution's float), biases float. Needs what has_pairs asks of each unit.
struct PairKernel {
  UnitKernel unit;
  StemKernel stem;  // whose weights are as stem_row_pairs says
  // Up to kImageChannels of a tensor's image, the first an even one, to pairs and back.
  int64_t (*image_scratch_bytes)(const TensorImage&);
  void (*read_image)(const TensorImage&, const void* from, Channels, void* pairs, int64_t plane, void* scratch);
  void (*write_image)(const TensorImage&, const void* pairs, int64_t plane, Channels, void* to, void* scratch);
  // An image's means are a pair in each plane.
  void (*window_means)(const Head&, const void* x, int64_t x_plane, Channels, void* means, int64_t means_plane);
  void (*linear)(const Head&, const Convolution&, const void* means, int64_t means_plane, int64_t images,
                 Channels classes, void* result);
};
inline constexpr int64_t kImageChannels = 16;
inline constexpr int64_t kPairsSlackBytes = 64;  // behind an image's planes of pairs: whole vectors are read

// Whether pairs neither straddle the groups that conv1 reads nor what the result is put together from.
inline bool has_pairs(const Unit& unit) { return unit.conv1_depth() % 2 == 0 && unit.out_channels % 2 == 0; }

// PairKernel's stem has for each row of its window the taps of all columns, channel by channel, in so many pairs: where
// they are an odd number, behind the last of them is a zero.
inline int64_t stem_row_pairs(const Stem& stem) { return ceil_div(stem.in_channels * stem.kernel_size, 2); }

inline constexpr int64_t kScratchAlignment = 64;  // of buffers and scratch, in bytes

// Cache lines from plane to plane, for so many at least. A tile reads the same few lines of many planes: where planes
// are larger than that, an odd number spreads them over all sets of a cache (720x1280, conv1: 1.4 times as fast).
inline int64_t plane_lines(int64_t lines) { return lines > 8 ? lines | 1 : lines; }

struct Isa {
  const char* name;
  bool (*usable)();                  // on this processor
  UnitKernel (*unit_kernel)(Dtype);  // Dtype's accumulator is double for float64, float for all others
  NetworkKernel (*network_kernel)(Dtype);
  // Dtype is that of a program's x and result: bfloat16 or float32. Null without dot products of bfloat16.
  PairKernel (*pair_kernel)(Dtype);
  int64_t vector_bytes;
};

// The instruction sets that the library was compiled for and that this processor has, the most capable last.
std::vector<std::string> usable_isas();

// The ISA in use: the most capable, or what SHUFFLENET_EXT_CPU_ISA or select_isa named.
const Isa& isa();
void select_isa(const std::string& name);

}  // namespace shufflenet::cpu
