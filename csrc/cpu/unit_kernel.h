// The unit, written once over Simd<A>. Pixels lie along the vectors and weights are broadcast, so any number of
// channels and groups fills the lanes. Three phases on a Part, each of which can be split by channels (kernels.h):
//
//   stage    copies the part's rows of x into planes of the accumulator type; nothing to do where x is that already
//   expand   conv1 from x to y1 (scratch); then the depthwise convolution from y1, with its halo rows, to y2 (or to the
//            result, where the unit ends here), the shuffle being the order in which it writes its channels; with
//            stride 2 also the pooled shortcut, from x to the result
//   project  conv3 from y2, adding the residual, to the result
//
// Where x is contiguous and of the accumulator's type it is read, and the result written, in place. Otherwise the
// result's planes are copied out at the end of a phase.
namespace shufflenet::cpu::SHUFFLENET_ISA {

// Channels as planes of pixels: channel c starts at data + c * stride.
template <class A>
struct Planes {
  A* data = nullptr;
  int64_t stride = 0;
  A* channel(int64_t c) const { return data + c * stride; }
  Planes from(int64_t c) const { return {channel(c), stride}; }
};

// Cuts memory into arrays, one behind the other; only counts where there is none.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class U>
  U* take(int64_t n) {
    U* const array = memory_ ? reinterpret_cast<U*>(memory_ + bytes_) : nullptr;
    bytes_ += ceil_div(n * static_cast<int64_t>(sizeof(U)), kScratchAlignment) * kScratchAlignment;
    return array;
  }
  // Each plane ends with a vector of slack: whole vectors are loaded and stored past its last pixel.
  template <class A>
  Planes<A> planes(int64_t channels, int64_t pixels) {
    constexpr int64_t kLineElements = kScratchAlignment / sizeof(A);
    static_assert(kVectorBytes <= kScratchAlignment, "a line holds a vector");
    const int64_t stride = plane_lines(ceil_div(pixels, kLineElements) + 1) * kLineElements;
    return {take<A>(channels * stride), stride};
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// ---- Pointwise convolution ------------------------------------------------------------------------------------------

// A tile's accumulators, one vector each, stay in registers next to a vector of pixels for each column and one
// broadcast weight. Eight channels use each loaded pixel vector eight times, three vectors use each broadcast weight
// three times: 11 loads for 24 multiply-adds. More vectors than three were slower on Zen 4, fewer leave the FMA latency
// exposed.
inline constexpr int kTileVectors = 3;
inline constexpr int kTileChannels = kRegisters == 32 ? 8 : 4;
static_assert(kTileChannels * kTileVectors + kTileVectors + 1 <= kRegisters, "a tile must fit the registers");

template <class A>
struct PointwiseTile {
  const A* x;
  const int64_t* offsets;  // from x to the pixels of each of the depth's planes
  int64_t depth;
  int64_t block;    // of the depth; see kMostTerms
  const A* weight;  // a row of depth for each channel of the tile
  // Cache lines that a later tile works on, one for each step of the depth, which are prefetched (HasAhead). They may
  // lie past the end of what is there.
  const A* ahead;  // null: none
  const int64_t* ahead_offsets;
  const A* scale;  // null: 1
  const A* bias;
  const A* residual;  // null: none
  int64_t residual_stride;
  A* y;
  int64_t y_stride;
  typename Simd<A>::Mask tail;  // lanes of the last vector that are pixels
};

// A tile's end, once for each case of the residual: where both were one loop, the compiler kept the addresses of all
// rows at once, and moved them through vector registers.
template <class A, int Channels, int Vectors, bool HasTail, bool HasResidual>
inline void finish_tile(const PointwiseTile<A>& t, typename Simd<A>::V (&sum)[Channels][Vectors]) {
  using S = Simd<A>;
  using V = typename S::V;
  const A* residual = t.residual;
  A* y = t.y;
  const int64_t residual_stride = t.residual_stride, y_stride = t.y_stride;
  const auto tail = t.tail;
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const bool masked = HasTail && v == Vectors - 1;
      V value = sum[c][v];
      if (HasResidual) {
        value += masked ? S::load(residual + v * S::kLanes, tail) : S::load(residual + v * S::kLanes);
      }
      value = S::max(V{}, value);
      if (masked) {
        S::store(y + v * S::kLanes, value, tail);
      } else {
        S::store(y + v * S::kLanes, value);
      }
    }
    if (HasResidual) residual += residual_stride;
    y += y_stride;
  }
}

// Adds the products of terms [begin, end) of the depth to the sums. A masked load costs an FMA unit's slot, so only
// tiles with a tail (HasTail) have one.
template <class A, int Channels, int Vectors, bool HasTail, bool HasAhead>
inline void add_products(const PointwiseTile<A>& t, const A* const (&weights)[Channels], int64_t begin, int64_t end,
                         typename Simd<A>::V (&sum)[Channels][Vectors]) {
  using S = Simd<A>;
  using V = typename S::V;
  for (int64_t k = begin; k < end; ++k) {
    if constexpr (HasAhead) __builtin_prefetch(t.ahead + t.ahead_offsets[k]);
    const A* const x = t.x + t.offsets[k];
    V pixels[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const bool masked = HasTail && v == Vectors - 1;
      pixels[v] = masked ? S::load(x + v * S::kLanes, t.tail) : S::load(x + v * S::kLanes);
    }
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const V weight = S::broadcast(weights[c][k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] = S::fma(weight, pixels[v], sum[c][v]);
    }
  }
}

// Terms that are summed one behind the other: a deeper sum is one of equal blocks of at most so many, as its rounding
// errors would grow with the square root of the depth. Errors of the paper's units against float64 are so 0.97 times
// eager PyTorch's, geometric mean of their root mean squares; 1.17 times with one sum, 0.93 with blocks of 40. It takes
// 0.5 to 1 % of a unit's time; with blocks of 40, 2 %.
inline constexpr int64_t kMostTerms = 64;

// y = relu(scale * (weight x) + bias + residual) for Channels x Vectors. Each pixel sums over the depth in the same
// order whatever the tile, so results do not depend on how pixels are cut into tiles. The bias comes last: a sum that
// began with it would be rounded with it at every step (networks' errors against float64 were 1.16 times as large, and
// larger than eager PyTorch's; the nine taps of the depthwise convolution are few).
template <class A, int Channels, int Vectors, bool HasTail, bool HasAhead>
void pointwise_tile(const PointwiseTile<A>& t) {
  using S = Simd<A>;
  using V = typename S::V;
  const A* weights[Channels];  // a pointer a row: address arithmetic in the loop would compete for the FMA units' ports
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c) weights[c] = t.weight + c * t.depth;
  V sum[Channels][Vectors] = {};
  add_products<A, Channels, Vectors, HasTail, HasAhead>(t, weights, 0, std::min(t.block, t.depth), sum);
  for (int64_t k = t.block; k < t.depth; k += t.block) {
    V before[Channels][Vectors];
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        before[c][v] = sum[c][v];
        sum[c][v] = V{};
      }
    }
    add_products<A, Channels, Vectors, HasTail, HasAhead>(t, weights, k, std::min(k + t.block, t.depth), sum);
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] += before[c][v];
    }
  }
  if (t.scale) {
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const V scale = S::broadcast(t.scale[c]);
      const V bias = S::broadcast(t.bias[c]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] = S::fma(sum[c][v], scale, bias);
    }
  } else {
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const V bias = S::broadcast(t.bias[c]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] += bias;
    }
  }
  if (t.residual) {
    finish_tile<A, Channels, Vectors, HasTail, true>(t, sum);
  } else {
    finish_tile<A, Channels, Vectors, HasTail, false>(t, sum);
  }
}

template <class A>
using PointwiseFunction = void (*)(const PointwiseTile<A>&);

template <class A, int... I>
constexpr std::array<PointwiseFunction<A>, sizeof...(I)> pointwise_functions(std::integer_sequence<int, I...>) {
  return {pointwise_tile<A, I / 4 / kTileVectors + 1, I / 4 % kTileVectors + 1, I / 2 % 2 == 1, I % 2 == 1>...};
}

template <class A>
void run_pointwise_tile(int64_t channels, int64_t vectors, bool has_tail, const PointwiseTile<A>& tile) {
  static constexpr auto functions =
      pointwise_functions<A>(std::make_integer_sequence<int, kTileChannels * kTileVectors * 4>{});
  functions[((channels - 1) * kTileVectors + vectors - 1) * 4 + has_tail * 2 + (tile.ahead != nullptr)](tile);
}

// n channels left: how many the next tile takes, such that all tiles are about equal (20 as 7, 7, 6).
inline int64_t next_channels(int64_t n) { return ceil_div(n, ceil_div(n, kTileChannels)); }

// A run of pixels cut into tiles of nearly equal numbers of vectors. Divides once: a division for each tile would show.
template <class A>
struct PixelTiles {
  explicit PixelTiles(int64_t pixels)
      : pixels(pixels),
        vectors(ceil_div(pixels, Simd<A>::kLanes)),
        count(ceil_div(vectors, kTileVectors)),
        least(vectors / std::max<int64_t>(1, count)),  // none where a lone pixel is all there is
        larger(vectors - least * count) {}
  int64_t begin(int64_t tile) const { return tile * least + std::min(tile, larger); }
  int64_t tile_vectors(int64_t tile) const { return least + (tile < larger ? 1 : 0); }
  int64_t pixel(int64_t tile) const { return begin(tile) * Simd<A>::kLanes; }
  // Pixels in the tile's last vector.
  int64_t tail(int64_t tile) const {
    return std::min<int64_t>(Simd<A>::kLanes, pixels - (begin(tile + 1) - 1) * Simd<A>::kLanes);
  }
  int64_t pixels, vectors, count;
  int64_t least;   // vectors of a tile
  int64_t larger;  // tiles, the first ones, have one more
};

// A plane's last pixel, where it would have a vector for itself: a 7x7 plane, of every vector's length. Such a plane's
// tiles would fill 49 of 64 lanes; the pixel as one dot product a channel, along the depth, costs a tenth of that
// vector (measured: units of stage 4 19 % faster). Which pixel it is depends on the plane alone, so that a result
// does not depend on the part in which it is computed.
template <class A>
bool has_lone_pixel(int64_t plane, int64_t pixel_end) {
  return pixel_end == plane && plane > Simd<A>::kLanes && plane % Simd<A>::kLanes == 1;
}

// Copies a pixel's column through the planes, followed by zeros to the end of a vector.
template <class A>
void gather_column(const A* x, const int64_t* offsets, int64_t depth, A* column) {
  for (int64_t k = 0; k < depth; ++k) column[k] = x[offsets[k]];
  std::fill(column + depth, column + ceil_div(depth, Simd<A>::kLanes) * Simd<A>::kLanes, A{0});
}

template <class A>
Tile largest_tile(int64_t channels, const PixelTiles<A>& tiles) {
  return {next_channels(channels), tiles.count ? ceil_div(tiles.vectors, tiles.count) : 0};
}

template <class A>
Tile tile(int64_t channels, int64_t pixels, int64_t plane) {
  return largest_tile(channels, PixelTiles<A>(has_lone_pixel<A>(plane, plane) ? pixels - 1 : pixels));
}

// What pointwise_tile computes, for one pixel: y = relu(scale * (weight column) + bias + residual).
template <class A>
void pointwise_pixel(const PointwiseTile<A>& t, int64_t rows, const A* column) {
  using S = Simd<A>;
  for (int64_t row = 0; row < rows; ++row) {
    const A* const weight = t.weight + row * t.depth;
    typename S::V sum = {};
    int64_t k = 0;
    for (; k + S::kLanes <= t.depth; k += S::kLanes) sum = S::fma(S::load(weight + k), S::load(column + k), sum);
    if (k < t.depth) sum = S::fma(S::load(weight + k, S::first(t.depth - k)), S::load(column + k), sum);
    A value = S::sum(sum) * (t.scale ? t.scale[row] : A{1}) + t.bias[row];
    if (t.residual) value += t.residual[row * t.residual_stride];
    t.y[row * t.y_stride] = value < 0 ? A{0} : value;
  }
}

// Consecutive rows of a grouped pointwise convolution that share their inputs.
struct RowTile {
  int64_t row, rows, group;
};

// What of a pointwise convolution's operands, apart from its weights, is in planes of an image that no cache holds.
enum class Far { nothing, x, y };

template <class A>
struct Pointwise {
  const Convolution& conv;
  int64_t depth;  // of a group
  const RowTile* row_tiles;
  int64_t row_tile_count;
  int64_t y_row;  // the row whose results are channel 0 of y
  int64_t pixels;
  Far far = Far::nothing;
};

// The work lists of a pointwise convolution, in memory of the worker.
template <class A>
struct PointwiseScratch {
  PointwiseScratch() = default;
  PointwiseScratch(Arena& arena, int64_t rows, int64_t depth)
      : row_tiles(arena.take<RowTile>(rows)),
        offsets(arena.take<int64_t>(depth)),
        weight_offsets(arena.take<int64_t>(depth)),
        y_offsets(arena.take<int64_t>(depth)),
        column(arena.take<A>(depth + Simd<A>::kLanes)) {}
  RowTile* row_tiles;
  int64_t* offsets;  // to the pixels of each of the depth's planes
  // To lines that later tiles work on, in the order in which a tile's steps prefetch them.
  int64_t *weight_offsets, *y_offsets;
  A* column;

  void fill_weight_offsets(int64_t depth) const {
    for (int64_t k = 0; k < depth; ++k) weight_offsets[k] = k * kTileChannels;
  }
  void fill_y_offsets(int64_t depth, int64_t y_stride) const {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t line = std::min<int64_t>(k, kTileChannels * kTileVectors - 1);
      y_offsets[k] = line % kTileChannels * y_stride + line / kTileChannels * Simd<A>::kLanes;
    }
  }
};

// Pixels of a group's inputs that stay in the L1 cache while all row tiles work on them: half of the cache.
inline constexpr int64_t kBlockBytes = 24 * 1024;

// Of the row tiles, each works on a block of pixel tiles. What a tile waits for, because no cache has it and the
// processor does not see it coming, another prefetches a line at a time (all at once, they would hold up the loads of
// the tile itself): the weights of the next rows, as its own prefetching ends with a page, which is a tile or two; and
// of planes that are far, of which it would have to follow too many, those pixels of x on which the next block works, a
// vector by each of a group's first row tiles, or the lines of y to which the next tile adds (units of stage 2 at
// 720x1280: 1.1 times as fast).
//
// Offsets and row tiles are in `scratch`; `has_lone_pixel` says that there is one behind the other pixels.
template <class A>
void pointwise(const Pointwise<A>& p, Planes<const A> x, Planes<const A> residual, Planes<A> y, bool has_lone_pixel,
               const PointwiseScratch<A>& scratch) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const PixelTiles<A> tiles(has_lone_pixel ? p.pixels - 1 : p.pixels);
  const auto weight_of = [&](const RowTile& rows) { return static_cast<const A*>(p.conv.weight) + rows.row * p.depth; };
  const auto x_of = [&](const RowTile& rows, int64_t pixel) { return x.channel(rows.group * p.depth) + pixel; };
  const auto y_of = [&](const RowTile& rows, int64_t pixel) { return y.channel(rows.row - p.y_row) + pixel; };
  PointwiseTile<A> t;
  t.offsets = scratch.offsets;
  t.depth = p.depth;
  t.block = ceil_div(p.depth, ceil_div(p.depth, kMostTerms));
  t.residual_stride = residual.stride;
  t.y_stride = y.stride;
  const auto point_to = [&](const RowTile& rows, int64_t pixel) {
    t.weight = weight_of(rows);
    t.scale = p.conv.scale ? static_cast<const A*>(p.conv.scale) + rows.row : nullptr;
    t.bias = static_cast<const A*>(p.conv.bias) + rows.row;
    t.x = x_of(rows, pixel);
    t.residual = residual.data ? residual.channel(rows.row) + pixel : nullptr;
    t.y = y_of(rows, pixel);
  };
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (p.depth * kTileVectors * kVectorBytes));
  int64_t gathered = -1;  // the group whose column is there
  int64_t begin = 0, end = 0;
  do {  // once where a lone pixel is all there is
    end = std::min(tiles.count, begin + block);
    int64_t tile_of_group = 0;
    for (int64_t i = 0; i < p.row_tile_count; ++i) {
      const RowTile& rows = p.row_tiles[i];
      const bool is_last = i + 1 == p.row_tile_count;
      const RowTile& next_rows = p.row_tiles[is_last ? 0 : i + 1];
      for (int64_t tile = begin; tile < end; ++tile) {
        t.ahead = nullptr;
        if (p.far == Far::x && tile + block < tiles.count && tile_of_group < tiles.tile_vectors(tile + block)) {
          t.ahead = x_of(rows, tiles.pixel(tile + block) + tile_of_group * kLanes);
          t.ahead_offsets = t.offsets;
        } else if (p.far == Far::y) {
          const int64_t next = tile + 1 < end ? tile + 1 : is_last ? end : begin;
          if (next < tiles.count) t.ahead = y_of(tile + 1 < end ? rows : next_rows, tiles.pixel(next));
          t.ahead_offsets = scratch.y_offsets;
        } else if (tile == 0 && !is_last) {
          t.ahead = weight_of(next_rows);
          t.ahead_offsets = scratch.weight_offsets;
        }
        const int64_t tail = tiles.tail(tile);
        t.tail = Simd<A>::first(tail);
        point_to(rows, tiles.pixel(tile));
        run_pointwise_tile(rows.rows, tiles.tile_vectors(tile), tail != kLanes, t);
      }
      if (has_lone_pixel && end == tiles.count) {  // now, while the rows' weights are in the L1 cache
        point_to(rows, tiles.pixels);
        if (rows.group != gathered) gather_column(t.x, t.offsets, p.depth, scratch.column);
        gathered = rows.group;
        pointwise_pixel(t, rows.rows, scratch.column);
      }
      tile_of_group = next_rows.group == rows.group ? tile_of_group + 1 : 0;
    }
    begin = end;
  } while (begin < tiles.count);
}

// Some rows of a grouped pointwise convolution.
template <class A>
void grouped_pointwise(const Convolution& conv, int64_t depth, int64_t group_rows, Channels rows, Planes<const A> x,
                       int64_t pixels, Planes<const A> residual, Planes<A> y, int64_t y_row, bool lone_pixel,
                       const PointwiseScratch<A>& scratch, Far far) {
  int64_t count = 0;
  for (int64_t row = rows.begin; row < rows.end; row += scratch.row_tiles[count++].rows) {
    const int64_t group = row / group_rows;
    scratch.row_tiles[count] = {row, next_channels(std::min(rows.end, (group + 1) * group_rows) - row), group};
  }
  for (int64_t k = 0; k < depth; ++k) scratch.offsets[k] = k * x.stride;
  scratch.fill_weight_offsets(depth);
  if (far == Far::y) scratch.fill_y_offsets(depth, y.stride);
  pointwise<A>({conv, depth, scratch.row_tiles, count, y_row, pixels, far}, x, residual, y, lone_pixel, scratch);
}

// Larger than what an L2 cache has room for.
template <class A>
bool is_far(int64_t channels, int64_t pixels) {
  constexpr int64_t kMostBytes = 1024 * 1024;
  return channels * pixels * static_cast<int64_t>(sizeof(A)) > kMostBytes;
}

// To y1, from its channel 0 on.
template <class A>
void conv1(const Unit& unit, const Convolution& conv, Channels rows, Planes<const A> x, int64_t pixels, Planes<A> y1,
           bool lone_pixel, const PointwiseScratch<A>& scratch) {
  grouped_pointwise<A>(
      conv, unit.conv1_depth(), unit.conv1_group_rows(), rows, x, pixels, {}, y1, rows.begin, lone_pixel, scratch,
      is_far<A>(unit.in_channels, unit.height * unit.width) ? Far::x : Far::nothing);
}

template <class A>
void conv3(const Unit& unit, const Convolution& conv, Channels rows, Planes<const A> y2, int64_t pixels,
           Planes<const A> residual, Planes<A> result, bool lone_pixel, const PointwiseScratch<A>& scratch) {
  grouped_pointwise<A>(
      conv, unit.slice_channels(), unit.out_channels / unit.groups, rows, y2, pixels, residual, result, 0, lone_pixel,
      scratch, is_far<A>(unit.result_channels(), unit.out_height() * unit.out_width()) ? Far::y : Far::nothing);
}

// ---- Depthwise 3x3 convolution and average pooling ------------------------------------------------------------------

// Lanes that lie inside the row: beyond its left and right end the taps see zeros. One entry a vector of results. With
// stride 1 a vector runs on over the ends of rows, and both side taps are masked; lanes past the last pixel are masked
// as well. With stride 2 it covers a part of one row, reads two vectors from the centre tap's first column on, and
// takes the left taps from the right taps before.
template <class A>
struct EdgeMasks {
  typename Simd<A>::Mask left;  // with stride 1 only
  typename Simd<A>::Mask right[2];
};

template <class A>
int64_t edge_vectors(const Unit& unit, const Part& part) {
  const int64_t run = unit.stride == 1 ? (part.row_end - part.row_begin) * unit.width : unit.out_width();
  return ceil_div(run, Simd<A>::kLanes);
}

template <class A>
void fill_edge_masks(const Unit& unit, const Part& part, EdgeMasks<A>* masks) {
  using S = Simd<A>;
  const int64_t vectors = edge_vectors<A>(unit, part);
  int64_t column = 0;  // of the lane, with stride 1
  int64_t pixels_left = (part.row_end - part.row_begin) * unit.width;
  for (int64_t v = 0; v < vectors; ++v) {
    if (unit.stride == 1) {
      uint32_t left = 0, right = 0;
      for (int lane = 0; lane < S::kLanes && pixels_left > 0; ++lane, --pixels_left) {
        if (column > 0) left |= uint32_t{1} << lane;
        if (column < unit.width - 1) right |= uint32_t{1} << lane;
        column = column == unit.width - 1 ? 0 : column + 1;
      }
      masks[v] = {S::mask(left), {S::mask(right)}};
    } else {
      for (int half = 0; half < 2; ++half) {
        const int64_t first = (2 * v + half) * S::kLanes;
        masks[v].right[half] = S::first(std::max<int64_t>(0, unit.width - first));
      }
    }
  }
}

// A row's even and odd columns from the left, a vector of each at a time: the taps of a 3x3 window at stride 2.
template <class A>
class StridedColumns {
 public:
  using S = Simd<A>;
  using V = typename S::V;

  // Of the 2 * kLanes columns that are next, given as two vectors.
  void next(V first, V second) {
    const V odd = S::odd(first, second);
    left = S::shift_in(right, odd);
    centre = S::even(first, second);
    right = odd;
  }

  V left = {}, centre = {}, right = {};  // left of the row's first column is zero
};

// A vector of results with stride 1. Lanes past the last pixel (HasTail) load zeros: what lies there may be denormal,
// which would cost a microcode assist.
template <class A, bool HasTail>
typename Simd<A>::V depthwise_sum(const A* centre, int64_t width, const EdgeMasks<A>& edges,
                                  const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias,
                                  typename Simd<A>::Mask tail) {
  using S = Simd<A>;
  typename S::V sum = bias;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i, centre += width) {
    sum = S::fma(S::load(centre - 1, edges.left), weight[3 * i], sum);
    sum = S::fma(HasTail ? S::load(centre, tail) : S::load(centre), weight[3 * i + 1], sum);
    sum = S::fma(S::load(centre + 1, edges.right[0]), weight[3 * i + 2], sum);
  }
  return sum;
}

// One plane with stride 1, its rows run together: x starts with the row above the first.
template <class A>
void depthwise_stride1(const A* x, int64_t width, int64_t pixels, const EdgeMasks<A>* masks,
                       const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias, typename Simd<A>::V lower,
                       A* y) {
  using S = Simd<A>;
  const auto tail = S::first(pixels % S::kLanes);
  int64_t v = 0, pixel = 0;
  for (; pixel + S::kLanes <= pixels; ++v, pixel += S::kLanes) {
    S::store(y + pixel, S::max(lower, depthwise_sum<A, false>(x + pixel, width, masks[v], weight, bias, tail)));
  }
  if (pixel < pixels) {
    S::store(y + pixel, S::max(lower, depthwise_sum<A, true>(x + pixel, width, masks[v], weight, bias, tail)), tail);
  }
}

template <class A>
void depthwise_stride2(const A* x, int64_t width, int64_t out_rows, int64_t out_width, const EdgeMasks<A>* masks,
                       const typename Simd<A>::V (&weight)[9], typename Simd<A>::V bias, typename Simd<A>::V lower,
                       A* y) {
  using S = Simd<A>;
  for (int64_t row = 0; row < out_rows; ++row, x += 2 * width) {
    StridedColumns<A> columns[3];
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      typename S::V sum = bias;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const A* const from = x + i * width + 2 * column;
        columns[i].next(S::load(from, masks[v].right[0]), S::load(from + S::kLanes, masks[v].right[1]));
        sum = S::fma(columns[i].left, weight[3 * i], sum);
        sum = S::fma(columns[i].centre, weight[3 * i + 1], sum);
        sum = S::fma(columns[i].right, weight[3 * i + 2], sum);
      }
      S::store(y + row * out_width + column, S::max(lower, sum), S::first(out_width - column));
    }
  }
}

// The part's rows of intermediate channel c. x has the halo row above the first, of zeros at the image's edge.
template <class A>
void depthwise_channel(const Unit& unit, const Part& part, const Convolution& conv, int64_t c,
                       const EdgeMasks<A>* masks, const A* x, A* y) {
  using S = Simd<A>;
  const int64_t rows = part.row_end - part.row_begin;
  const auto lower = S::broadcast(unit.conv2_relu ? A{0} : -std::numeric_limits<A>::infinity());
  const A scale = conv.scale ? static_cast<const A*>(conv.scale)[c] : A{1};
  const auto bias = S::broadcast(static_cast<const A*>(conv.bias)[c]);
  typename S::V weight[9];
  for (int i = 0; i < 9; ++i) weight[i] = S::broadcast(static_cast<const A*>(conv.weight)[c * 9 + i] * scale);
  if (unit.stride == 1) {
    depthwise_stride1<A>(x, unit.width, rows * unit.width, masks, weight, bias, lower, y);
  } else {
    depthwise_stride2<A>(x, unit.width, rows, unit.out_width(), masks, weight, bias, lower, y);
  }
}

// From some rows of conv1, in y1 from its channel 0 on, to their channels of y2: row r * slice_channels + n of conv1 is
// intermediate channel n * groups + r behind the shuffle.
template <class A>
void depthwise(const Unit& unit, const Part& part, const Convolution& conv, Channels rows, const EdgeMasks<A>* masks,
               Planes<const A> y1, Planes<A> y2) {
  const int64_t slice = unit.slice_channels();
  int64_t row = rows.begin;
  for (int64_t r = row / slice; row < rows.end; ++r) {
    for (; row < std::min(rows.end, (r + 1) * slice); ++row) {
      const int64_t channel = (row - r * slice) * unit.groups + r;
      depthwise_channel<A>(unit, part, conv, channel, masks, y1.channel(row - rows.begin), y2.channel(channel));
    }
  }
}

// relu(avg_pool2d(x, 3, stride=2, padding=1)) of some channels; x starts with input row x_row, and the row above that
// is in x_above (null: there is none). The rows are added before the columns, which so are sorted once; and they are
// gone through from the top to the bottom, so that of three rows two have to be loaded.
template <class A>
void pool(const Unit& unit, const Part& part, Channels channels, const EdgeMasks<A>* masks, Planes<const A> x,
          int64_t x_row, Planes<const A> x_above, Planes<A> result) {
  using S = Simd<A>;
  using V = typename S::V;
  const V one = S::broadcast(1), ninth = one / 9;
  const int64_t width = unit.width, out_width = unit.out_width();  // a division, not to be made for each row
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A* const first = x.channel(c) + (2 * part.row_begin - x_row) * width;
    const A* above = 2 * part.row_begin > x_row ? first - width : nullptr;
    if (!above && x_above.data) {
      above = x_above.channel(c);
      // The row is of another thread, in as many places as there are channels: that of a channel some way ahead is on
      // its way from that core's cache while this one is pooled (three times as fast for the shortcut of stage 3).
      constexpr int64_t kAhead = 8;
      for (int64_t column = 0; column < width && c + kAhead < channels.end; column += S::kLanes) {
        __builtin_prefetch(x_above.channel(c + kAhead) + column);
      }
    }
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      // Of x: two vectors of columns, the second of which starts with `second`, and the column before them.
      const int64_t left = 2 * column, second = left + S::kLanes;
      const EdgeMasks<A> mask = masks[v];
      const auto stored = S::first(out_width - column);
      V shares[3] = {ninth, ninth, ninth};  // by the rows that count
      if (!unit.pool_count_include_pad) {
        const V inside = S::odd(S::keep(one, mask.right[0]), S::keep(one, mask.right[1]));
        const V share = one / (S::shift_in(S::broadcast(column > 0 ? 1 : 0), inside) + one + inside);
        for (int rows = 1; rows <= 3; ++rows) shares[rows - 1] = share / static_cast<A>(rows);
      }
      V top[2] = {};
      A top_before = 0;
      if (above) {
        top[0] = S::load(above + left, mask.right[0]);
        top[1] = S::load(above + second, mask.right[1]);
        if (column > 0) top_before = above[left - 1];
      }
      const A* middle = first;
      A* y = result.channel(c) + column;
      for (int64_t row = part.row_begin; row < part.row_end; ++row, middle += 2 * width, y += out_width) {
        const bool has_bottom = 2 * row + 1 < unit.height;
        V bottom[2] = {};
        A before = top_before;
        top_before = 0;
        if (has_bottom) {
          bottom[0] = S::load(middle + width + left, mask.right[0]);
          bottom[1] = S::load(middle + width + second, mask.right[1]);
          if (column > 0) top_before = middle[width + left - 1];
        }
        if (column > 0) before = middle[left - 1] + before + top_before;
        const V first_half = S::load(middle + left, mask.right[0]) + top[0] + bottom[0];
        const V second_half = S::load(middle + second, mask.right[1]) + top[1] + bottom[1];
        const V right = S::odd(first_half, second_half);
        const V sum = S::shift_in(S::broadcast(before), right) + S::even(first_half, second_half) + right;
        S::store(y, S::max(V{}, sum * shares[(row > 0) + has_bottom]), stored);
        top[0] = bottom[0];
        top[1] = bottom[1];
      }
    }
  }
}

// ---- Staging --------------------------------------------------------------------------------------------------------

// How the pixels of an image's channels lie in a tensor of T: contiguous planes, or the channels of a pixel together.
template <class T>
struct Image {
  T* data;
  Layout layout;
  int64_t channels;  // of the tensor
  int64_t plane;     // elements from plane to plane
};

// Copies pixels [begin, begin + pixels) of some channels from an image to planes.
template <class T>
void stage_in(const Image<const T>& image, int64_t begin, int64_t pixels, Channels range,
              Planes<accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      const T* from = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) S::store(planes.channel(c) + p, load_first(from + p, pixels - p));
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = range.begin; c < range.end; c += kLanes) {
      const int64_t channels = range.end - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && p + i < pixels; ++i) {
        rows[i] = load_first(image.data + (begin + p + i) * image.channels + c, channels);
      }
      S::transpose(rows);
      for (int i = 0; i < kLanes && i < channels; ++i) S::store(planes.channel(c + i) + p, rows[i]);
    }
  }
}

// Copies the other way.
template <class T>
void stage_out(const Image<T>& image, int64_t begin, int64_t pixels, Channels range,
               Planes<const accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      T* to = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) store_first(to + p, S::load(planes.channel(c) + p), pixels - p);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = range.begin; c < range.end; c += kLanes) {
      const int64_t channels = range.end - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && i < channels; ++i) rows[i] = S::load(planes.channel(c + i) + p);
      S::transpose(rows);
      for (int i = 0; i < kLanes && p + i < pixels; ++i) {
        store_first(image.data + (begin + p + i) * image.channels + c, rows[i], channels);
      }
    }
  }
}

// ---- The unit -------------------------------------------------------------------------------------------------------

template <class T>
bool is_staged(const Unit& unit) {
  return unit.layout != Layout::contiguous || !std::is_same_v<T, accumulator_t<T>>;
}

// The rows that a part reads: of y1 with its halo, and of the image.
struct InputRows {
  InputRows(const Unit& unit, const Part& part)
      : halo_begin(part.row_begin * unit.stride - 1),
        halo_end((part.row_end - 1) * unit.stride + 2),
        begin(halo_begin > 0 ? halo_begin : 0),
        end(halo_end < unit.height ? halo_end : unit.height) {}
  int64_t halo_begin, halo_end;
  int64_t begin, end;
};

// What the phases of a part hand on to each other.
template <class T>
struct Buffers {
  using A = accumulator_t<T>;

  Buffers(const Unit& unit, const Part& part, void* memory) {
    const InputRows in(unit, part);
    const int64_t out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    Arena arena(memory);
    if (unit.has_conv3()) y2 = arena.planes<A>(unit.mid_channels, out_pixels);
    if (is_staged<T>(unit)) {
      x = arena.planes<A>(unit.in_channels, (in.end - in.begin) * unit.width);
      // A residual is added where it lies: conv1 is done with x by then.
      if (unit.adds_residual()) {
        result = {x.channel(0) + (part.row_begin - in.begin) * unit.width, x.stride};
      } else {
        result = arena.planes<A>(unit.result_channels(), out_pixels);
      }
    }
    bytes = arena.bytes();
  }

  Planes<A> y2, x, result;
  int64_t bytes;
};

template <class A>
Planes<const A> read_only(Planes<A> planes) {
  return {planes.data, planes.stride};
}

// A part with its buffers and the pointers of its image.
template <class T>
struct PartView : Buffers<T> {
  using A = accumulator_t<T>;

  PartView(const Unit& unit, const UnitPointers& pointers, const Part& part, void* memory)
      : Buffers<T>(unit, part, memory), in(unit, part), staged(is_staged<T>(unit)) {
    in_begin = in.begin * unit.width;
    in_pixels = (in.end - in.begin) * unit.width;
    out_begin = part.row_begin * unit.out_width();
    out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    image_x = {static_cast<const T*>(pointers.x), unit.layout, unit.in_channels, pointers.x_plane};
    image_result = {static_cast<T*>(pointers.result), unit.layout, unit.result_channels(), pointers.result_plane};
    planes_x = read_only(this->x);
    if constexpr (std::is_same_v<T, A>) {
      if (!staged) {
        planes_x = {image_x.data + in_begin, pointers.x_plane};
        this->result = {image_result.data + out_begin, pointers.result_plane};
      }
    }
  }

  void write_out(Channels channels) const {
    if (staged) stage_out<T>(image_result, out_begin, out_pixels, channels, read_only(this->result));
  }

  InputRows in;
  bool staged;
  int64_t in_begin, in_pixels, out_begin, out_pixels;
  Image<const T> image_x;
  Image<T> image_result;
  Planes<const A> planes_x;  // the part's rows of x, staged or in place
};

template <class T>
int64_t buffer_bytes(const Unit& unit, const Part& part) {
  return Buffers<T>(unit, part, nullptr).bytes;
}

template <class T>
void stage(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers) {
  const PartView<T> view(unit, pointers, part, buffers);
  if (view.staged) stage_in<T>(view.image_x, view.in_begin, view.in_pixels, channels, view.x);
}

// What one worker needs for its channels of a phase.
template <class A>
struct Scratch {
  Scratch(const Unit& unit, const Part& part, Channels mid, void* memory) {
    const InputRows in(unit, part);
    Arena arena(memory);
    masks = arena.take<EdgeMasks<A>>(edge_vectors<A>(unit, part));
    y1 = arena.planes<A>(mid.count(), (in.halo_end - in.halo_begin) * unit.width);
    const int64_t depth = std::max(unit.conv1_depth(), unit.slice_channels());
    pointwise = {arena, std::max(unit.mid_channels, unit.out_channels), depth};
    bytes = arena.bytes();
  }

  EdgeMasks<A>* masks;
  Planes<A> y1;
  PointwiseScratch<A> pointwise;
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const Unit& unit, const Part& part, Channels mid) {
  return Scratch<accumulator_t<T>>(unit, part, mid, nullptr).bytes;
}

// Zeros to the rows of y1 that lie outside of the image.
template <class A>
void clear_outside(const Unit& unit, const InputRows& in, int64_t channels, Planes<A> y1) {
  for (int64_t c = 0; c < channels; ++c) {
    A* const plane = y1.channel(c);
    std::fill(plane, plane + (in.begin - in.halo_begin) * unit.width, A{0});
    std::fill(plane + (in.end - in.halo_begin) * unit.width, plane + (in.halo_end - in.halo_begin) * unit.width, A{0});
  }
}

// The channels of the shortcut that go with some rows of conv1 to a worker.
inline Channels pooled_with(const Unit& unit, Channels rows, int64_t multiple) {
  const int64_t n = unit.in_channels / multiple;
  return {n * rows.begin / unit.mid_channels * multiple, n * rows.end / unit.mid_channels * multiple};
}

template <class T>
void expand(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels rows, void* buffers,
            void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const InputRows& in = view.in;
  const Scratch<A> scratch(unit, part, rows, memory);
  const Planes<A> y1 = scratch.y1;
  clear_outside(unit, in, rows.count(), y1);
  const Planes<A> y1_image = {y1.data + (in.begin - in.halo_begin) * unit.width, y1.stride};
  const bool lone_pixel = has_lone_pixel<A>(unit.height * unit.width, in.end * unit.width);
  conv1<A>(unit, pointers.conv1, rows, view.planes_x, view.in_pixels, y1_image, lone_pixel, scratch.pointwise);
  const Planes<A> y2 = unit.has_conv3() ? view.y2 : view.result;
  fill_edge_masks<A>(unit, part, scratch.masks);
  depthwise<A>(unit, part, pointers.conv2, rows, scratch.masks, read_only(y1), y2);
  if (unit.concatenates_pool()) {
    const Channels pooled = pooled_with(unit, rows, 1);
    pool<A>(unit, part, pooled, scratch.masks, view.planes_x, view.in.begin, {}, view.result.from(unit.out_channels));
    view.write_out({unit.out_channels + pooled.begin, unit.out_channels + pooled.end});
  }
}

template <class T>
void project(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers,
             void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const Scratch<A> scratch(unit, part, {}, memory);
  if (unit.has_conv3()) {
    const bool lone_pixel = has_lone_pixel<A>(unit.out_height() * unit.out_width(), part.row_end * unit.out_width());
    Planes<const A> residual;
    if (unit.adds_residual()) {
      residual = {view.planes_x.data + (part.row_begin - view.in.begin) * unit.width, view.planes_x.stride};
    }
    conv3<A>(unit, pointers.conv3, channels, read_only(view.y2), view.out_pixels, residual, view.result, lone_pixel,
             scratch.pointwise);
  }
  view.write_out(channels);
}

// ---- Strips ---------------------------------------------------------------------------------------------------------

// A strip's rows of y1: the row above its own, its own, and with stride 1 the row below. Copies of its first and last
// own row are for its neighbours: in lines of their own, few and one behind the other, which nobody writes meanwhile.
template <class A>
struct StripRows {
  StripRows(const Unit& unit, const Strip& strip) : StripRows(unit, strip.part, strip.y1, strip.lent) {}
  StripRows(const Unit& unit, const Part& part, void* y1_memory, void* lent_memory)
      : in(unit, part),
        own_begin(part.row_begin * unit.stride),
        own_end(std::min(part.row_end * unit.stride, unit.height)),
        width(unit.width) {
    Arena arena(y1_memory), lent(lent_memory);
    y1 = arena.planes<A>(unit.mid_channels, (in.halo_end - in.halo_begin) * width);
    first_row = {lent.take<A>(unit.mid_channels * width), width};
    last_row = {lent.take<A>(unit.mid_channels * width), width};
    bytes = arena.bytes();
    lent_bytes = lent.bytes();
  }
  int64_t own_rows() const { return own_end - own_begin; }
  // From row 0, the one above the strip's own.
  Planes<A> from_row(int64_t row) const { return {y1.data + row * width, y1.stride}; }

  InputRows in;
  int64_t own_begin, own_end, width;
  Planes<A> y1, first_row, last_row;
  int64_t bytes, lent_bytes;
};

// A strip is projected some rows at a time, whose y2 stays in the L2 cache, and from the bottom, as x and y1 may not:
// their last rows are those that have just been worked on.
template <class A>
struct StripScratch {
  static constexpr int64_t kMostY2Bytes = 256 * 1024;

  StripScratch(const Unit& unit, const Part& part, void* memory) {
    const int64_t row_bytes = unit.mid_channels * unit.out_width() * static_cast<int64_t>(sizeof(A));
    rows = std::clamp<int64_t>(kMostY2Bytes / row_bytes, 1, part.row_end - part.row_begin);
    Arena arena(memory);
    y2 = arena.planes<A>(unit.mid_channels, rows * unit.out_width());
    worker = static_cast<char*>(memory) + arena.bytes();
    bytes = arena.bytes() + Scratch<A>(unit, {part.row_begin, part.row_begin + rows}, {}, nullptr).bytes;
  }
  int64_t rows;
  Planes<A> y2;
  void* worker;
  int64_t bytes;
};

template <class A>
int64_t strip_bytes(const Unit& unit, const Part& part) {
  return StripRows<A>(unit, part, nullptr, nullptr).bytes;
}

template <class A>
int64_t lent_bytes(const Unit& unit, const Part& part) {
  return StripRows<A>(unit, part, nullptr, nullptr).lent_bytes;
}

template <class A>
int64_t strip_scratch_bytes(const Unit& unit, const Part& part) {
  return StripScratch<A>(unit, part, nullptr).bytes;
}

template <class A>
Planes<A> planes(const RowsOfImage& rows) {
  return {static_cast<A*>(rows.data), rows.plane};
}

template <class A>
void copy_row(const Unit& unit, Planes<A> to, Planes<const A> from) {
  for (int64_t c = 0; c < unit.mid_channels; ++c) std::copy_n(from.channel(c), unit.width, to.channel(c));
}

template <class A>
void clear_row(const Unit& unit, Planes<A> row) {
  for (int64_t c = 0; c < unit.mid_channels; ++c) std::fill_n(row.channel(c), unit.width, A{0});
}

// What the strips above and below need of y1.
template <class A>
void lend_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  if (strip.above) copy_row<A>(unit, rows.first_row, read_only(rows.from_row(1)));
  if (strip.below) copy_row<A>(unit, rows.last_row, read_only(rows.from_row(rows.own_rows())));
}

template <class A>
void expand_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<A> rows(unit, strip);
  const Scratch<A> scratch(unit, strip.part, {}, memory);
  const bool lone_pixel = has_lone_pixel<A>(unit.height * unit.width, rows.own_end * unit.width);
  const Planes<const A> x = read_only(planes<A>(strip.x));
  conv1<A>(unit, pointers.conv1, {0, unit.mid_channels}, x, rows.own_rows() * unit.width, rows.from_row(1), lone_pixel,
           scratch.pointwise);
  if (unit.concatenates_pool()) {
    fill_edge_masks<A>(unit, strip.part, scratch.masks);
    pool<A>(unit, strip.part, {0, unit.in_channels}, scratch.masks, x, rows.own_begin,
            read_only(planes<A>(strip.x_above)), planes<A>(strip.result).from(unit.out_channels));
  }
  lend_rows(unit, strip, rows);
}

// The rows around a strip's own: from where another strip has them, or zeros outside the image.
template <class A>
void borrow_rows(const Unit& unit, const Strip& strip, const StripRows<A>& rows) {
  if (strip.above) {
    copy_row<A>(unit, rows.y1, read_only(StripRows<A>(unit, *strip.above).last_row));
  } else {
    clear_row(unit, rows.y1);
  }
  if (rows.in.halo_end == rows.own_end) return;
  const Planes<A> below = rows.from_row(rows.own_rows() + 1);
  if (strip.below) {
    copy_row<A>(unit, below, read_only(StripRows<A>(unit, *strip.below).first_row));
  } else {
    clear_row(unit, below);
  }
}

template <class A>
void project_strip(const Unit& unit, const UnitPointers& pointers, const Strip& strip, void* memory) {
  const StripRows<A> rows(unit, strip);
  borrow_rows(unit, strip, rows);
  const StripScratch<A> own(unit, strip.part, memory);
  const Planes<const A> x = read_only(planes<A>(strip.x));
  const Planes<A> result = planes<A>(strip.result);
  const int64_t out_width = unit.out_width();
  const int64_t parts = ceil_div(strip.part.row_end - strip.part.row_begin, own.rows);
  for (int64_t i = parts - 1; i >= 0; --i) {
    const int64_t row = strip.part.row_begin + i * own.rows;
    const Part part = {row, std::min(strip.part.row_end, row + own.rows)};
    const Scratch<A> scratch(unit, part, {}, own.worker);
    fill_edge_masks<A>(unit, part, scratch.masks);
    const int64_t before = row - strip.part.row_begin, pixel = before * out_width;
    depthwise<A>(unit, part, pointers.conv2, {0, unit.mid_channels}, scratch.masks,
                 read_only(rows.from_row(before * unit.stride)), own.y2);
    const bool lone_pixel = has_lone_pixel<A>(unit.out_height() * out_width, part.row_end * out_width);
    const Planes<const A> residual = {x.data + pixel, x.stride};
    conv3<A>(unit, pointers.conv3, {0, unit.out_channels}, read_only(own.y2), (part.row_end - row) * out_width,
             unit.adds_residual() ? residual : Planes<const A>{}, {result.data + pixel, result.stride}, lone_pixel,
             scratch.pointwise);
  }
}

template <class T>
void to_accumulator(const void* from, void* to, int64_t n) {
  using A = accumulator_t<T>;
  for (int64_t i = 0; i < n; i += Simd<A>::kLanes) {
    store_first<A>(static_cast<A*>(to) + i, load_first(static_cast<const T*>(from) + i, n - i), n - i);
  }
}

inline int64_t expand_multiple(const Unit&) { return 1; }

template <class T>
constexpr UnitKernel kernel_for() {
  using A = accumulator_t<T>;
  return {
      sizeof(T),
      1,
      expand_multiple,
      1,
      buffer_bytes<T>,
      is_staged<T>,
      stage<T>,
      scratch_bytes<T>,
      expand<T>,
      project<T>,
      strip_bytes<A>,
      lent_bytes<A>,
      strip_scratch_bytes<A>,
      expand_strip<A>,
      project_strip<A>,
      tile<A>,
      to_accumulator<T>};
}

inline UnitKernel unit_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return kernel_for<double>();
    case Dtype::bfloat16: return kernel_for<BFloat16>();
    case Dtype::float16: return kernel_for<Float16>();
    default: return kernel_for<float>();
  }
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
