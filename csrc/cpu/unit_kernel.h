// The unit, written once over Simd<A>. Pixels lie along the vectors and weights are broadcast, so any number of
// channels and groups fills the lanes. Three phases on a Part, each of which can be split by channels (kernels.h):
//
//   stage    copies the part's rows of x into planes of the accumulator type; nothing to do where x is that already
//   expand   conv1 from x to y1 (scratch), the shuffle being the stride with which it writes its channels; then the
//            depthwise convolution from y1, with its halo rows, to y2 (or to the result, where the unit ends here)
//   project  conv3 from y2, adding the residual, to the result; with stride 2 also the pooled shortcut
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
  const A* x;  // depth planes
  int64_t x_stride;
  int64_t depth;
  const A* weight;  // a row of depth for each channel of the tile
  const A* scale;
  const A* bias;
  const A* residual;  // null: none
  int64_t residual_stride;
  A* y;
  int64_t y_stride;
  typename Simd<A>::Mask tail;  // lanes of the last vector that are pixels
};

// y = relu(scale * (weight x) + bias + residual) for Channels x Vectors. Each pixel sums over the depth in the same
// order whatever the tile, so results do not depend on how pixels are cut into tiles.
template <class A, int Channels, int Vectors>
void pointwise_tile(const PointwiseTile<A>& tile) {
  const PointwiseTile<A> t = tile;  // a copy that no store can alias
  using S = Simd<A>;
  using V = typename S::V;
  V sum[Channels][Vectors] = {};
  const A* x = t.x;
  const A* weights[Channels];  // a pointer a row: address arithmetic in the loop would compete for the FMA units' ports
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c) weights[c] = t.weight + c * t.depth;
  for (int64_t k = 0; k < t.depth; ++k, x += t.x_stride) {
    V pixels[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors - 1; ++v) pixels[v] = S::load(x + v * S::kLanes);
    pixels[Vectors - 1] = S::load(x + (Vectors - 1) * S::kLanes, t.tail);
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const V weight = S::broadcast(weights[c][k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[c][v] = S::fma(weight, pixels[v], sum[c][v]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Channels; ++c) {
    const V scale = S::broadcast(t.scale[c]);
    const V bias = S::broadcast(t.bias[c]);
    const A* residual = t.residual + c * t.residual_stride;
    A* y = t.y + c * t.y_stride;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const bool last = v == Vectors - 1;
      V value = S::fma(sum[c][v], scale, bias);
      if (t.residual) {
        value += last ? S::load(residual + v * S::kLanes, t.tail) : S::load(residual + v * S::kLanes);
      }
      value = S::max(V{}, value);
      if (last) {
        S::store(y + v * S::kLanes, value, t.tail);
      } else {
        S::store(y + v * S::kLanes, value);
      }
    }
  }
}

template <class A>
using PointwiseFunction = void (*)(const PointwiseTile<A>&);

template <class A, int... I>
constexpr std::array<PointwiseFunction<A>, sizeof...(I)> pointwise_functions(std::integer_sequence<int, I...>) {
  return {pointwise_tile<A, I / kTileVectors + 1, I % kTileVectors + 1>...};
}

template <class A>
void run_pointwise_tile(int64_t channels, int64_t vectors, const PointwiseTile<A>& tile) {
  static constexpr auto functions =
      pointwise_functions<A>(std::make_integer_sequence<int, kTileChannels * kTileVectors>{});
  functions[(channels - 1) * kTileVectors + vectors - 1](tile);
}

// n channels left: how many the next tile takes, such that all tiles are about equal (20 as 7, 7, 6).
inline int64_t next_channels(int64_t n) { return ceil_div(n, ceil_div(n, kTileChannels)); }

// A run of pixels cut into tiles of nearly equal numbers of vectors.
template <class A>
struct PixelTiles {
  explicit PixelTiles(int64_t pixels)
      : pixels(pixels), vectors(ceil_div(pixels, Simd<A>::kLanes)), count(ceil_div(vectors, kTileVectors)) {}
  int64_t begin(int64_t tile) const { return vectors * tile / count; }
  int64_t tile_vectors(int64_t tile) const { return begin(tile + 1) - begin(tile); }
  int64_t pixel(int64_t tile) const { return begin(tile) * Simd<A>::kLanes; }
  typename Simd<A>::Mask tail(int64_t tile) const {
    return Simd<A>::first(pixels - (begin(tile + 1) - 1) * Simd<A>::kLanes);
  }
  int64_t pixels, vectors, count;
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
void gather_column(Planes<const A> x, int64_t pixel, int64_t depth, A* column) {
  for (int64_t k = 0; k < depth; ++k) column[k] = x.channel(k)[pixel];
  std::fill(column + depth, column + ceil_div(depth, Simd<A>::kLanes) * Simd<A>::kLanes, A{0});
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
    A value = S::sum(sum) * t.scale[row] + t.bias[row];
    if (t.residual) value += t.residual[row * t.residual_stride];
    t.y[row * t.y_stride] = value < 0 ? A{0} : value;
  }
}

// Rows of a grouped pointwise convolution that share their inputs: all their tiles, and the lone pixel behind them
// where there is a column of it. x and y are the first planes.
template <class A>
void pointwise_rows(const Convolution& conv, int64_t row, int64_t rows, int64_t depth, const PixelTiles<A>& tiles,
                    Planes<const A> x, const A* column, Planes<const A> residual, Planes<A> y) {
  PointwiseTile<A> t;
  t.x_stride = x.stride;
  t.depth = depth;
  t.weight = static_cast<const A*>(conv.weight) + row * depth;
  t.scale = static_cast<const A*>(conv.scale) + row;
  t.bias = static_cast<const A*>(conv.bias) + row;
  t.residual_stride = residual.stride;
  t.y_stride = y.stride;
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t pixel = tiles.pixel(tile);
    t.tail = tiles.tail(tile);
    t.x = x.data + pixel;
    t.residual = residual.data ? residual.data + pixel : nullptr;
    t.y = y.data + pixel;
    run_pointwise_tile(rows, tiles.tile_vectors(tile), t);
  }
  if (column) {
    t.residual = residual.data ? residual.data + tiles.pixels : nullptr;
    t.y = y.data + tiles.pixels;
    pointwise_pixel(t, rows, column);
  }
}

// Some channels of y1, in shuffled order. Intermediate channel n * groups + r of that order is row
// r * slice_channels + n of conv1: each r needs consecutive rows and writes them `groups` channels apart. `column`
// holds a lone pixel's column; null: there is none.
template <class A>
void conv1(const Unit& unit, const Convolution& conv, Channels channels, Planes<const A> x, int64_t pixels,
           Planes<A> y1, A* column) {
  const int64_t slice = unit.slice_channels();
  const int64_t depth = unit.conv1_depth();
  const PixelTiles<A> tiles(column ? pixels - 1 : pixels);
  int64_t gathered = -1;  // the group whose column is there
  for (int64_t r = 0; r < unit.groups; ++r) {
    const int64_t row_end = r * slice + ceil_div(channels.end - r, unit.groups);
    int64_t row = r * slice + ceil_div(channels.begin - r, unit.groups);
    while (row < row_end) {
      const int64_t group = row / unit.conv1_group_rows();
      const int64_t rows = next_channels(std::min(row_end, (group + 1) * unit.conv1_group_rows()) - row);
      const int64_t channel = (row - r * slice) * unit.groups + r;
      const Planes<const A> group_x = x.from(group * depth);
      if (column && group != gathered) gather_column(group_x, tiles.pixels, depth, column);
      gathered = group;
      pointwise_rows<A>(conv, row, rows, depth, tiles, group_x, column, {},
                        {y1.channel(channel - channels.begin), unit.groups * y1.stride});
      row += rows;
    }
  }
}

// Some of conv3's output channels.
template <class A>
void conv3(const Unit& unit, const Convolution& conv, Channels channels, Planes<const A> y2, int64_t pixels,
           Planes<const A> residual, Planes<A> result, A* column) {
  const int64_t group_rows = unit.out_channels / unit.groups;
  const int64_t depth = unit.slice_channels();
  const PixelTiles<A> tiles(column ? pixels - 1 : pixels);
  int64_t gathered = -1;
  for (int64_t row = channels.begin; row < channels.end;) {
    const int64_t group = row / group_rows;
    const int64_t rows = next_channels(std::min(channels.end, (group + 1) * group_rows) - row);
    const Planes<const A> group_y2 = y2.from(group * depth);
    if (column && group != gathered) gather_column(group_y2, tiles.pixels, depth, column);
    gathered = group;
    pointwise_rows<A>(conv, row, rows, depth, tiles, group_y2, column, residual.data ? residual.from(row) : residual,
                      result.from(row));
    row += rows;
  }
}

// ---- Depthwise 3x3 convolution and average pooling ------------------------------------------------------------------

// Lanes that lie inside the row: beyond its left and right end the taps see zeros. One entry a vector of results. With
// stride 1 a vector runs on over the ends of rows, and both side taps are masked. With stride 2 it covers a part of one
// row, reads two vectors from the centre tap's first column on, and takes the left taps from the right taps before.
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
  for (int64_t v = 0; v < vectors; ++v) {
    if (unit.stride == 1) {
      uint32_t left = 0, right = 0;
      for (int lane = 0; lane < S::kLanes; ++lane) {
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

// The sums over the taps of a row of results, columns two apart, vector by vector from the left. A null row lies
// outside the image.
template <class A>
class StridedTaps {
 public:
  using S = Simd<A>;
  using V = typename S::V;

  StridedTaps(const A* top, const A* middle, const A* bottom, const A* weight)
      : rows_{top, middle, bottom}, weight_(weight) {}

  V next(const EdgeMasks<A>& masks) {
    V sum = {};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      if (!rows_[i]) continue;
      const V first = S::load(rows_[i], masks.right[0]);
      const V second = S::load(rows_[i] + S::kLanes, masks.right[1]);
      const V right = S::odd(first, second);
      sum = S::fma(S::shift_in(right_before_[i], right), S::broadcast(weight_[3 * i]), sum);
      sum = S::fma(S::even(first, second), S::broadcast(weight_[3 * i + 1]), sum);
      sum = S::fma(right, S::broadcast(weight_[3 * i + 2]), sum);
      right_before_[i] = right;
      rows_[i] += 2 * S::kLanes;
    }
    return sum;
  }

 private:
  const A* rows_[3];
  const A* weight_;
  V right_before_[3] = {};  // its last lane is the left tap of the next vector's first; zero at the row's left end
};

// One plane with stride 1, its rows run together: x starts with the row above the first.
template <class A>
void depthwise_stride1(const A* x, int64_t width, int64_t pixels, const EdgeMasks<A>* masks, const A* weight, A scale,
                       A bias, A lower, A* y) {
  using S = Simd<A>;
  for (int64_t v = 0, pixel = 0; pixel < pixels; ++v, pixel += S::kLanes) {
    typename S::V sum = {};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const A* centre = x + i * width + pixel;
      sum = S::fma(S::load(centre - 1, masks[v].left), S::broadcast(weight[3 * i]), sum);
      sum = S::fma(S::load(centre), S::broadcast(weight[3 * i + 1]), sum);
      sum = S::fma(S::load(centre + 1, masks[v].right[0]), S::broadcast(weight[3 * i + 2]), sum);
    }
    const auto value = S::max(S::broadcast(lower), S::fma(sum, S::broadcast(scale), S::broadcast(bias)));
    S::store(y + pixel, value, S::first(pixels - pixel));
  }
}

template <class A>
void depthwise_stride2(const A* x, int64_t width, int64_t out_rows, int64_t out_width, const EdgeMasks<A>* masks,
                       const A* weight, A scale, A bias, A lower, A* y) {
  using S = Simd<A>;
  for (int64_t row = 0; row < out_rows; ++row) {
    const A* top = x + 2 * row * width;
    StridedTaps<A> taps(top, top + width, top + 2 * width, weight);
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      const auto sum = taps.next(masks[v]);
      const auto value = S::max(S::broadcast(lower), S::fma(sum, S::broadcast(scale), S::broadcast(bias)));
      S::store(y + row * out_width + column, value, S::first(out_width - column));
    }
  }
}

// The part's rows of some intermediate channels. y1 has the halo row above the first, of zeros at the image's edge.
template <class A>
void depthwise(const Unit& unit, const Part& part, const Convolution& conv, Channels channels,
               const EdgeMasks<A>* masks, Planes<const A> y1, Planes<A> y2) {
  const int64_t rows = part.row_end - part.row_begin;
  const A lower = unit.conv2_relu ? A{0} : -std::numeric_limits<A>::infinity();
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const A* x = y1.channel(c - channels.begin);
    const A* weight = static_cast<const A*>(conv.weight) + c * 9;
    const A scale = static_cast<const A*>(conv.scale)[c];
    const A bias = static_cast<const A*>(conv.bias)[c];
    if (unit.stride == 1) {
      depthwise_stride1<A>(x, unit.width, rows * unit.width, masks, weight, scale, bias, lower, y2.channel(c));
    } else {
      depthwise_stride2<A>(x, unit.width, rows, unit.out_width(), masks, weight, scale, bias, lower, y2.channel(c));
    }
  }
}

// relu(avg_pool2d(x, 3, stride=2, padding=1)) of some channels; x starts with input row x_row.
template <class A>
void pool(const Unit& unit, const Part& part, Channels channels, const EdgeMasks<A>* masks, Planes<const A> x,
          int64_t x_row, Planes<A> result) {
  using S = Simd<A>;
  using V = typename S::V;
  static constexpr A ones[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const V one = S::broadcast(1);
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      const A* const middle = x.channel(c) + (2 * row - x_row) * unit.width;
      const bool has_top = row > 0, has_bottom = 2 * row + 1 < unit.height;
      StridedTaps<A> taps(
          has_top ? middle - unit.width : nullptr, middle, has_bottom ? middle + unit.width : nullptr, ones);
      const V rows = S::broadcast(static_cast<A>(1 + has_top + has_bottom));
      A* y = result.channel(c) + (row - part.row_begin) * unit.out_width();
      V right_before = {};
      for (int64_t v = 0, column = 0; column < unit.out_width(); ++v, column += S::kLanes) {
        V share = S::broadcast(A{1} / 9);
        if (!unit.pool_count_include_pad) {
          const V right = S::odd(S::keep(one, masks[v].right[0]), S::keep(one, masks[v].right[1]));
          share = one / ((S::shift_in(right_before, right) + one + right) * rows);
          right_before = right;
        }
        S::store(y + column, S::max(V{}, taps.next(masks[v]) * share), S::first(unit.out_width() - column));
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
  int64_t plane;     // pixels of a channel
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
    const int64_t stride = (ceil_div(pixels, Simd<A>::kLanes) + 1) * Simd<A>::kLanes;
    return {take<A>(channels * stride), stride};
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// What the phases of a part hand on to each other.
template <class T>
struct Buffers {
  using A = accumulator_t<T>;

  Buffers(const Unit& unit, const Part& part, void* memory) {
    const InputRows in(unit, part);
    const int64_t out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    Arena arena(memory);
    masks = arena.take<EdgeMasks<A>>(edge_vectors<A>(unit, part));
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

  EdgeMasks<A>* masks;
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
    const int64_t in_plane = unit.height * unit.width;
    const int64_t out_plane = unit.out_height() * unit.out_width();
    in_begin = in.begin * unit.width;
    in_pixels = (in.end - in.begin) * unit.width;
    out_begin = part.row_begin * unit.out_width();
    out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    image_x = {static_cast<const T*>(pointers.x) + part.image * unit.in_channels * in_plane, unit.layout,
               unit.in_channels, in_plane};
    image_result = {static_cast<T*>(pointers.result) + part.image * unit.result_channels() * out_plane, unit.layout,
                    unit.result_channels(), out_plane};
    planes_x = read_only(this->x);
    if constexpr (std::is_same_v<T, A>) {
      if (!staged) {
        planes_x = {image_x.data + in_begin, in_plane};
        this->result = {image_result.data + out_begin, out_plane};
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
void prepare(const Unit& unit, const Part& part, void* buffers) {
  using A = accumulator_t<T>;
  fill_edge_masks<A>(unit, part, Buffers<T>(unit, part, buffers).masks);
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
    y1 = arena.planes<A>(mid.count(), (in.halo_end - in.halo_begin) * unit.width);
    column = arena.take<A>(std::max(unit.conv1_depth(), unit.slice_channels()) + Simd<A>::kLanes);
    bytes = arena.bytes();
  }

  Planes<A> y1;
  A* column;
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const Unit& unit, const Part& part, Channels mid) {
  return Scratch<accumulator_t<T>>(unit, part, mid, nullptr).bytes;
}

template <class T>
void expand(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers,
            void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const InputRows& in = view.in;
  const Scratch<A> scratch(unit, part, channels, memory);
  const Planes<A> y1 = scratch.y1;
  for (int64_t c = 0; c < channels.count(); ++c) {
    A* const plane = y1.channel(c);
    std::fill(plane, plane + (in.begin - in.halo_begin) * unit.width, A{0});
    std::fill(plane + (in.end - in.halo_begin) * unit.width, plane + (in.halo_end - in.halo_begin) * unit.width, A{0});
  }
  const Planes<A> y1_image = {y1.data + (in.begin - in.halo_begin) * unit.width, y1.stride};
  const bool lone_pixel = has_lone_pixel<A>(unit.height * unit.width, in.end * unit.width);
  conv1<A>(
      unit, pointers.conv1, channels, view.planes_x, view.in_pixels, y1_image, lone_pixel ? scratch.column : nullptr);
  const Planes<A> y2 = unit.has_conv3() ? view.y2 : view.result;
  depthwise<A>(unit, part, pointers.conv2, channels, view.masks, read_only(y1), y2);
  if (!unit.has_conv3()) view.write_out(channels);
}

template <class T>
void project(const Unit& unit, const UnitPointers& pointers, const Part& part, Channels channels, void* buffers,
             void* memory) {
  using A = accumulator_t<T>;
  const PartView<T> view(unit, pointers, part, buffers);
  const Channels convolved = {channels.begin, std::min(channels.end, unit.out_channels)};
  if (convolved.count() > 0) {
    const Scratch<A> scratch(unit, part, {}, memory);
    const bool lone_pixel = has_lone_pixel<A>(unit.out_height() * unit.out_width(), part.row_end * unit.out_width());
    Planes<const A> residual;
    if (unit.adds_residual()) {
      residual = {view.planes_x.data + (part.row_begin - view.in.begin) * unit.width, view.planes_x.stride};
    }
    conv3<A>(unit, pointers.conv3, convolved, read_only(view.y2), view.out_pixels, residual, view.result,
             lone_pixel ? scratch.column : nullptr);
  }
  const Channels pooled = {
      std::max(channels.begin, unit.out_channels) - unit.out_channels, channels.end - unit.out_channels};
  if (pooled.count() > 0) {
    pool<A>(unit, part, pooled, view.masks, view.planes_x, view.in.begin, view.result.from(unit.out_channels));
  }
  view.write_out(channels);
}

template <class T>
void to_accumulator(const void* from, void* to, int64_t n) {
  using A = accumulator_t<T>;
  for (int64_t i = 0; i < n; i += Simd<A>::kLanes) {
    store_first<A>(static_cast<A*>(to) + i, load_first(static_cast<const T*>(from) + i, n - i), n - i);
  }
}

template <class T>
constexpr UnitKernel kernel_for() {
  return {buffer_bytes<T>, prepare<T>, stage<T>, scratch_bytes<T>, expand<T>, project<T>, to_accumulator<T>};
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
