// The unit as one fused pass over a Part, written once over Simd<A>. Pixels lie along the vectors and weights are
// broadcast, so any number of channels and groups fills the lanes.
//
//   conv1      reads x, writes y1 (scratch). The shuffle is the stride with which it writes its channels.
//   depthwise  reads y1 with its halo rows, writes y2 (scratch, or the result where the unit ends here).
//   conv3      reads y2, adds the residual, writes the result.
//
// Where x is contiguous and of the accumulator's type it is read, and the result written, in place. Otherwise the part's
// rows are first copied ("staged") into planes of the accumulator type, and the result's planes copied out.
namespace shufflenet::cpu::SHUFFLENET_ISA {

// Channels as planes of pixels: channel c starts at data + c * stride.
template <class A>
struct Planes {
  A* data = nullptr;
  int64_t stride = 0;
  A* channel(int64_t c) const { return data + c * stride; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Pointwise convolution ------------------------------------------------------------------------------------------

// A tile's accumulators, one vector each, stay in registers next to a vector of pixels for each column and one broadcast
// weight. Eight channels use each loaded pixel vector eight times, three vectors use each broadcast weight three times:
// 11 loads for 24 multiply-adds. More vectors than three were slower on Zen 4, fewer leave the FMA latency exposed.
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
void pointwise_tile(const PointwiseTile<A>& t) {
  using S = Simd<A>;
  using V = typename S::V;
  V sum[Channels][Vectors] = {};
  const A* x = t.x;
  for (int64_t k = 0; k < t.depth; ++k, x += t.x_stride) {
    V pixels[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors - 1; ++v) pixels[v] = S::load(x + v * S::kLanes);
    pixels[Vectors - 1] = S::load(x + (Vectors - 1) * S::kLanes, t.tail);
#pragma GCC unroll 8
    for (int c = 0; c < Channels; ++c) {
      const V weight = S::broadcast(t.weight[c * t.depth + k]);
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

// The part's channels of y1, in shuffled order. Intermediate channel n * groups + r of that order is row
// r * slice_channels + n of conv1: for each r the part needs consecutive rows and writes them `groups` channels apart.
template <class A>
void conv1(const Unit& unit, const Part& part, const Convolution& conv, Planes<const A> x, int64_t pixels,
           Planes<A> y1) {
  const int64_t slice = unit.slice_channels();
  const int64_t first_channel = part.slice_begin * slice;
  const auto* weight = static_cast<const A*>(conv.weight);
  const PixelTiles<A> tiles(pixels);
  PointwiseTile<A> t = {};
  t.x_stride = x.stride;
  t.depth = unit.conv1_depth();
  t.y_stride = unit.groups * y1.stride;
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t pixel = tiles.pixel(tile);
    t.tail = tiles.tail(tile);
    for (int64_t r = 0; r < unit.groups; ++r) {
      const int64_t row_end = r * slice + ceil_div(part.slice_end * slice - r, unit.groups);
      int64_t row = r * slice + ceil_div(first_channel - r, unit.groups);
      while (row < row_end) {
        const int64_t group = row / unit.conv1_group_rows();
        const int64_t group_end = (group + 1) * unit.conv1_group_rows();
        const int64_t channels = next_channels((row_end < group_end ? row_end : group_end) - row);
        t.x = x.channel(group * t.depth) + pixel;
        t.weight = weight + row * t.depth;
        t.scale = static_cast<const A*>(conv.scale) + row;
        t.bias = static_cast<const A*>(conv.bias) + row;
        t.y = y1.channel((row - r * slice) * unit.groups + r - first_channel) + pixel;
        run_pointwise_tile(channels, tiles.tile_vectors(tile), t);
        row += channels;
      }
    }
  }
}

template <class A>
void conv3(const Unit& unit, const Part& part, const Convolution& conv, Planes<const A> y2, int64_t pixels,
           Planes<const A> residual, Planes<A> result) {
  const int64_t group_rows = unit.out_channels / unit.groups;
  const auto* weight = static_cast<const A*>(conv.weight);
  const PixelTiles<A> tiles(pixels);
  PointwiseTile<A> t = {};
  t.x_stride = y2.stride;
  t.depth = unit.slice_channels();
  t.residual_stride = residual.stride;
  t.y_stride = result.stride;
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t pixel = tiles.pixel(tile);
    t.tail = tiles.tail(tile);
    for (int64_t h = part.slice_begin; h < part.slice_end; ++h) {
      t.x = y2.channel((h - part.slice_begin) * t.depth) + pixel;
      const int64_t row_end = (h + 1) * group_rows;
      for (int64_t row = h * group_rows; row < row_end;) {
        const int64_t channels = next_channels(row_end - row);
        t.weight = weight + row * t.depth;
        t.scale = static_cast<const A*>(conv.scale) + row;
        t.bias = static_cast<const A*>(conv.bias) + row;
        t.residual = residual.data ? residual.channel(row) + pixel : nullptr;
        t.y = result.channel(row) + pixel;
        run_pointwise_tile(channels, tiles.tile_vectors(tile), t);
        row += channels;
      }
    }
  }
}

// ---- Depthwise 3x3 convolution and average pooling --------------------------------------------------------------------

// Lanes of vectors that lie inside the row: the columns at the left and right edge see zeros beyond it. One entry a
// vector: with stride 1 a vector runs on over the ends of rows (left and right taps), with stride 2 it covers a part of
// one row of the result and reads two vectors from each of two columns (the left tap's, the centre and right taps').
template <class A>
struct EdgeMasks {
  typename Simd<A>::Mask left[2], right[2];
};

// Bits of the lanes whose column, counted on from `column`, lies in a row of `width`.
inline uint32_t lanes_in_row(int64_t column, int64_t width, int lanes) {
  uint32_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    if (column + lane >= 0 && column + lane < width) bits |= uint32_t{1} << lane;
  }
  return bits;
}

template <class A>
int64_t edge_vectors(const Unit& unit, const Part& part) {
  const int64_t run = unit.stride == 1 ? (part.row_end - part.row_begin) * unit.width : unit.out_width();
  return ceil_div(run, Simd<A>::kLanes);
}

template <class A>
void fill_edge_masks(const Unit& unit, const Part& part, EdgeMasks<A>* masks) {
  using S = Simd<A>;
  const int64_t vectors = edge_vectors<A>(unit, part);
  for (int64_t v = 0; v < vectors; ++v) {
    if (unit.stride == 1) {
      uint32_t left = 0, right = 0;
      for (int lane = 0; lane < S::kLanes; ++lane) {
        const int64_t column = (v * S::kLanes + lane) % unit.width;
        if (column > 0) left |= uint32_t{1} << lane;
        if (column < unit.width - 1) right |= uint32_t{1} << lane;
      }
      masks[v] = {{S::mask(left)}, {S::mask(right)}};
    } else {
      for (int half = 0; half < 2; ++half) {
        const int64_t column = 2 * v * S::kLanes + half * S::kLanes;
        masks[v].left[half] = S::mask(lanes_in_row(column - 1, unit.width, S::kLanes));
        masks[v].right[half] = S::mask(lanes_in_row(column, unit.width, S::kLanes));
      }
    }
  }
}

// The sum over the taps of vector v of a row of results, columns two apart. A null row lies outside the image.
template <class A>
typename Simd<A>::V strided_taps(const A* const (&rows)[3], const A* weight, int64_t v, const EdgeMasks<A>& masks) {
  using S = Simd<A>;
  typename S::V sum = {};
  for (int i = 0; i < 3; ++i) {
    if (!rows[i]) continue;
    const A* centre = rows[i] + 2 * v * S::kLanes;
    const auto left0 = S::load(centre - 1, masks.left[0]);
    const auto left1 = S::load(centre - 1 + S::kLanes, masks.left[1]);
    const auto right0 = S::load(centre, masks.right[0]);
    const auto right1 = S::load(centre + S::kLanes, masks.right[1]);
    sum = S::fma(S::even(left0, left1), S::broadcast(weight[3 * i]), sum);
    sum = S::fma(S::even(right0, right1), S::broadcast(weight[3 * i + 1]), sum);
    sum = S::fma(S::odd(right0, right1), S::broadcast(weight[3 * i + 2]), sum);
  }
  return sum;
}

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
      sum = S::fma(S::load(centre - 1, masks[v].left[0]), S::broadcast(weight[3 * i]), sum);
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
    const A* const rows[3] = {top, top + width, top + 2 * width};
    for (int64_t v = 0, column = 0; column < out_width; ++v, column += S::kLanes) {
      const auto sum = strided_taps<A>(rows, weight, v, masks[v]);
      const auto value = S::max(S::broadcast(lower), S::fma(sum, S::broadcast(scale), S::broadcast(bias)));
      S::store(y + row * out_width + column, value, S::first(out_width - column));
    }
  }
}

// The part's rows of the intermediate channels. y1 has the halo row above the first, of zeros at the image's edge.
template <class A>
void depthwise(const Unit& unit, const Part& part, const Convolution& conv, const EdgeMasks<A>* masks,
               Planes<const A> y1, Planes<A> y2) {
  const int64_t rows = part.row_end - part.row_begin;
  const int64_t first = part.slice_begin * unit.slice_channels();
  const int64_t channels = part.slice_end * unit.slice_channels() - first;
  const A lower = unit.conv2_relu ? A{0} : -std::numeric_limits<A>::infinity();
  for (int64_t c = 0; c < channels; ++c) {
    const A* weight = static_cast<const A*>(conv.weight) + (first + c) * 9;
    const A scale = static_cast<const A*>(conv.scale)[first + c];
    const A bias = static_cast<const A*>(conv.bias)[first + c];
    if (unit.stride == 1) {
      depthwise_stride1<A>(y1.channel(c), unit.width, rows * unit.width, masks, weight, scale, bias, lower,
                           y2.channel(c));
    } else {
      depthwise_stride2<A>(y1.channel(c), unit.width, rows, unit.out_width(), masks, weight, scale, bias, lower,
                           y2.channel(c));
    }
  }
}

// relu(avg_pool2d(x, 3, stride=2, padding=1)) of some channels; x starts with input row x_row.
template <class A>
void pool(const Unit& unit, const Part& part, int64_t channel_begin, int64_t channel_end, const EdgeMasks<A>* masks,
          Planes<const A> x, int64_t x_row, Planes<A> result) {
  using S = Simd<A>;
  using V = typename S::V;
  static constexpr A ones[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  const V one = S::broadcast(1);
  for (int64_t c = channel_begin; c < channel_end; ++c) {
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      const A* rows[3];
      int inside = 0;
      for (int i = 0; i < 3; ++i) {
        const int64_t in_row = 2 * row - 1 + i;
        const bool in_image = in_row >= 0 && in_row < unit.height;
        rows[i] = in_image ? x.channel(c) + (in_row - x_row) * unit.width : nullptr;
        inside += in_image;
      }
      A* y = result.channel(c) + (row - part.row_begin) * unit.out_width();
      for (int64_t v = 0, column = 0; column < unit.out_width(); ++v, column += S::kLanes) {
        V count = S::broadcast(9);
        if (!unit.pool_count_include_pad) {
          const V left = S::even(S::keep(one, masks[v].left[0]), S::keep(one, masks[v].left[1]));
          const V right = S::odd(S::keep(one, masks[v].right[0]), S::keep(one, masks[v].right[1]));
          count = (left + one + right) * S::broadcast(static_cast<A>(inside));
        }
        const V value = S::max(V{}, strided_taps<A>(rows, ones, v, masks[v]) / count);
        S::store(y + column, value, S::first(unit.out_width() - column));
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

// Calls the contiguous or the transposing copy between pixels [begin, begin + pixels) of an image and planes.
template <class T>
void stage_in(const Image<const T>& image, int64_t begin, int64_t pixels, Planes<accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = 0; c < image.channels; ++c) {
      const T* from = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) S::store(planes.channel(c) + p, load_first(from + p, pixels - p));
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = 0; c < image.channels; c += kLanes) {
      const int64_t channels = image.channels - c;
      typename S::V rows[kLanes] = {};
      for (int i = 0; i < kLanes && p + i < pixels; ++i) {
        rows[i] = load_first(image.data + (begin + p + i) * image.channels + c, channels);
      }
      S::transpose(rows);
      for (int i = 0; i < kLanes && i < channels; ++i) S::store(planes.channel(c + i) + p, rows[i]);
    }
  }
}

template <class T>
void stage_out(const Image<T>& image, int64_t begin, int64_t pixels, int64_t channel_begin, int64_t channel_end,
               Planes<const accumulator_t<T>> planes) {
  using S = Simd<accumulator_t<T>>;
  constexpr int kLanes = S::kLanes;
  if (image.layout == Layout::contiguous) {
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      T* to = image.data + c * image.plane + begin;
      for (int64_t p = 0; p < pixels; p += kLanes) store_first(to + p, S::load(planes.channel(c) + p), pixels - p);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kLanes) {
    for (int64_t c = channel_begin; c < channel_end; c += kLanes) {
      const int64_t channels = channel_end - c;
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

// A part's buffers, one behind the other. Each plane ends with a vector of slack: whole vectors are loaded and stored
// past its last pixel.
template <class T>
struct Scratch {
  using A = accumulator_t<T>;

  Scratch(const Unit& unit, const Part& part, void* memory) : next(static_cast<char*>(memory)) {
    const InputRows in(unit, part);
    const int64_t channels = (part.slice_end - part.slice_begin) * unit.slice_channels();
    const int64_t out_pixels = (part.row_end - part.row_begin) * unit.out_width();
    masks = take<EdgeMasks<A>>(edge_vectors<A>(unit, part));
    y1 = planes(channels, (in.halo_end - in.halo_begin) * unit.width);
    if (unit.has_conv3()) y2 = planes(channels, out_pixels);
    if (!is_staged<T>(unit)) return;
    x = planes(unit.in_channels, (in.end - in.begin) * unit.width);
    if (!unit.adds_residual()) result = planes(unit.result_channels(), out_pixels);
  }

  template <class U>
  U* take(int64_t n) {
    char* const here = next;
    next += ceil_div(n * static_cast<int64_t>(sizeof(U)), kScratchAlignment) * kScratchAlignment;
    return reinterpret_cast<U*>(here);
  }
  Planes<A> planes(int64_t channels, int64_t pixels) {
    const int64_t stride = (ceil_div(pixels, Simd<A>::kLanes) + 1) * Simd<A>::kLanes;
    return {take<A>(channels * stride), stride};
  }

  EdgeMasks<A>* masks;
  Planes<A> y1, y2, x, result;
  char* next;  // the end
};

template <class T>
int64_t scratch_bytes(const Unit& unit, const Part& part) {
  return Scratch<T>(unit, part, nullptr).next - static_cast<char*>(nullptr);
}

template <class A>
Planes<const A> read_only(Planes<A> planes) {
  return {planes.data, planes.stride};
}

template <class T>
void run_unit(const Unit& unit, const UnitPointers& pointers, const Part& part, void* memory) {
  using A = accumulator_t<T>;
  const InputRows in(unit, part);
  const int64_t in_plane = unit.height * unit.width;
  const int64_t out_plane = unit.out_height() * unit.out_width();
  const int64_t in_pixels = (in.end - in.begin) * unit.width;
  const int64_t out_begin = part.row_begin * unit.out_width();
  const int64_t out_pixels = (part.row_end - part.row_begin) * unit.out_width();
  const T* const image_x = static_cast<const T*>(pointers.x) + part.image * unit.in_channels * in_plane;
  T* const image_result = static_cast<T*>(pointers.result) + part.image * unit.result_channels() * out_plane;

  Scratch<T> scratch(unit, part, memory);
  fill_edge_masks<A>(unit, part, scratch.masks);

  Planes<const A> x = read_only(scratch.x);
  Planes<A> result = scratch.result;
  const bool staged = is_staged<T>(unit);
  if (staged) {
    stage_in<T>({image_x, unit.layout, unit.in_channels, in_plane}, in.begin * unit.width, in_pixels, scratch.x);
    // A residual is added where it lies: conv1 is done with x by then.
    if (unit.adds_residual()) {
      result = {scratch.x.data + (part.row_begin - in.begin) * unit.width, scratch.x.stride};
    }
  } else if constexpr (std::is_same_v<T, A>) {
    x = {image_x + in.begin * unit.width, in_plane};
    result = {image_result + out_begin, out_plane};
  }

  const int64_t slice = unit.slice_channels();
  const int64_t channels = (part.slice_end - part.slice_begin) * slice;
  const Planes<A> y1_image = {scratch.y1.data + (in.begin - in.halo_begin) * unit.width, scratch.y1.stride};
  for (int64_t c = 0; c < channels; ++c) {
    A* const plane = scratch.y1.channel(c);
    std::fill(plane, plane + (in.begin - in.halo_begin) * unit.width, A{0});
    std::fill(plane + (in.end - in.halo_begin) * unit.width, plane + (in.halo_end - in.halo_begin) * unit.width, A{0});
  }
  conv1<A>(unit, part, pointers.conv1, x, in_pixels, y1_image);

  int64_t written_begin = part.slice_begin * slice, written_end = part.slice_end * slice;
  if (!unit.has_conv3()) {
    const Planes<A> y2 = {result.channel(written_begin), result.stride};
    depthwise<A>(unit, part, pointers.conv2, scratch.masks, read_only(scratch.y1), y2);
  } else {
    written_begin = part.slice_begin * (unit.out_channels / unit.groups);
    written_end = part.slice_end * (unit.out_channels / unit.groups);
    depthwise<A>(unit, part, pointers.conv2, scratch.masks, read_only(scratch.y1), scratch.y2);
    Planes<const A> residual;
    if (unit.adds_residual()) residual = {x.data + (part.row_begin - in.begin) * unit.width, x.stride};
    conv3<A>(unit, part, pointers.conv3, read_only(scratch.y2), out_pixels, residual, result);
  }

  const Image<T> image = {image_result, unit.layout, unit.result_channels(), out_plane};
  if (staged) stage_out<T>(image, out_begin, out_pixels, written_begin, written_end, read_only(result));
  if (unit.concatenates_pool()) {
    const int64_t begin = unit.in_channels * part.slice_begin / unit.groups;
    const int64_t end = unit.in_channels * part.slice_end / unit.groups;
    const Planes<A> pooled = {result.channel(unit.out_channels), result.stride};
    pool<A>(unit, part, begin, end, scratch.masks, x, in.begin, pooled);
    if (staged) {
      stage_out<T>(image, out_begin, out_pixels, unit.out_channels + begin, unit.out_channels + end,
                   read_only(result));
    }
  }
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
  return {scratch_bytes<T>, run_unit<T>, to_accumulator<T>};
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
