// Grouped pointwise convolutions, cut into tiles: conv1 and conv3 of a unit, and a stem's over its taps.
#pragma once

#include "planes.h"
#include "pointwise_tile.h"

namespace shufflenet::cpu::SHUFFLENET_ISA {

// Says how many of n channels that are left the next tile takes, such that all tiles are about equal (20 as 7, 7, 6).
inline int64_t next_channels(int64_t n) { return ceil_div(n, ceil_div(n, kTileChannels)); }

// Consecutive pixels, cut into tiles of nearly equal numbers of vectors. This divides once: a division for each tile
// would show.
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

// Whether a plane's last pixel would have a vector for itself, as in a 7x7 plane with every vector's length. Such a
// plane's tiles would fill 49 of 64 lanes; the pixel as one dot product a channel, along the depth, costs a tenth of
// that vector (measured: units of stage 4 19 % faster). Which pixel it is depends on the plane alone, so that a result
// does not depend on the part in which it is computed.
template <class A>
bool has_lone_pixel(int64_t plane, int64_t pixel_end) {
  return pixel_end == plane && plane > Simd<A>::kLanes && plane % Simd<A>::kLanes == 1;
}

// Copies a pixel's column through the planes, followed by zeros to the end of a vector. Plane k has it at x[offset(k)].
template <class T, class Offset>
void gather_column(const T* x, int64_t depth, const Offset& offset, T* column) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  for (int64_t k = 0; k < depth; ++k) column[k] = x[offset(k)];
  std::fill(column + depth, column + ceil_div(depth, kLanes) * kLanes, T{});
}

// The largest tile for so many channels that share their inputs, and for the last pixels of a plane, or of none.
template <class A>
Tile tile(int64_t channels, int64_t pixels, int64_t plane = 0) {
  const PixelTiles<A> tiles(has_lone_pixel<A>(plane, plane) ? pixels - 1 : pixels);
  return {next_channels(channels), tiles.count ? ceil_div(tiles.vectors, tiles.count) : 0};
}

// Consecutive rows of a grouped pointwise convolution that share their inputs.
struct RowRange {
  int64_t row, rows, group;
};

// What of a pointwise convolution's operands, apart from its weights, is in planes of an image that no cache holds.
enum class Far { nothing, x, y };

// Whether planes are larger than what an L2 cache has room for.
template <class A>
bool is_far(int64_t channels, int64_t pixels) {
  constexpr int64_t kMostBytes = 1024 * 1024;
  return channels * pixels * static_cast<int64_t>(sizeof(A)) > kMostBytes;
}

struct GroupedPointwise {
  const Convolution& conv;
  Activation activation;
  int64_t depth, group_rows;  // of a group
  // The planes of x that it reads, and of y that its rows go to, where it has no groups. Null: in their order.
  const int64_t* x_planes = nullptr;
  const int64_t* y_planes = nullptr;
};

// Some of its rows, cut into tiles.
struct Pointwise : GroupedPointwise {
  const RowRange* row_tiles;
  int64_t row_tile_count;
  int64_t y_row;  // the row whose results are channel 0 of y, where rows follow each other
  int64_t pixels;
  Far far = Far::nothing;
};

// The work lists of a pointwise convolution, in a worker's memory.
template <class A>
struct PointwiseLists {
  PointwiseLists() = default;
  PointwiseLists(Arena& arena, int64_t rows, int64_t depth)
      : row_tiles(arena.take<RowRange>(rows)),
        offsets(arena.take<int64_t>(depth)),
        weight_offsets(arena.take<int64_t>(depth)),
        y_offsets(arena.take<int64_t>(depth)),
        y_rows(arena.take<int64_t>(std::max<int64_t>(rows, kTileChannels))),
        column(arena.take<A>(depth + Simd<A>::kLanes)) {}
  RowRange* row_tiles;
  int64_t* offsets;  // to the pixels of each of the depth's planes
  // To lines that later tiles work on, in the order in which a tile's steps prefetch them.
  int64_t *weight_offsets, *y_offsets;
  int64_t* y_rows;  // from y to rows of the result: all, or those of any tile where rows follow each other
  A* column;

  void fill_y_rows(const Pointwise& p, int64_t y_stride) const {
    if (!p.y_planes) {
      for (int64_t row = 0; row < kTileChannels; ++row) y_rows[row] = row * y_stride;
      return;
    }
    for (const RowRange* tile = p.row_tiles; tile != p.row_tiles + p.row_tile_count; ++tile) {
      for (int64_t row = tile->row; row < tile->row + tile->rows; ++row) y_rows[row] = p.y_planes[row] * y_stride;
    }
  }
};

// Pixels of a group's inputs that stay in the L1 cache while all row tiles work on them: half of the cache.
inline constexpr int64_t kBlockBytes = 24 * 1024;

// Computes all row tiles, each on a block of pixel tiles at a time. What a tile waits for, because no cache has it and
// the processor does not see it coming, another prefetches a line at a time (all at once, they would hold up the loads
// of the tile itself): the weights of the next rows, as its own prefetching ends with a page, which is a tile or two;
// and of planes that are far, of which it would have to follow too many, those pixels of x on which the next block
// works, a vector by each of a group's first row tiles, or the lines of y to which the next tile adds (units of stage 2
// at 720x1280: 1.1 times as fast).
//
// Offsets and row tiles are in `lists`; `has_lone_pixel` says that there is one behind the other pixels.
template <class A>
void pointwise(const Pointwise& p, Planes<const A> x, Planes<const A> residual, Planes<A> y, bool has_lone_pixel,
               const PointwiseLists<A>& lists) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const PixelTiles<A> tiles(has_lone_pixel ? p.pixels - 1 : p.pixels);
  const auto weight_of = [&](const RowRange& rows) {
    return static_cast<const A*>(p.conv.weight) + rows.row * p.depth;
  };
  const auto x_of = [&](const RowRange& rows, int64_t pixel) { return x.channel(rows.group * p.depth) + pixel; };
  // The first row of a tile, and from where its rows are counted.
  const auto y_of = [&](const RowRange& rows, int64_t pixel) {
    return p.y_planes ? y.data + lists.y_rows[rows.row] + pixel : y.channel(rows.row - p.y_row) + pixel;
  };
  lists.fill_y_rows(p, y.stride);
  PointwiseTile<A> t;
  t.offsets = lists.offsets;
  t.depth = t.weight_stride = p.depth;
  t.block = ceil_div(p.depth, ceil_div(p.depth, kMostTerms));
  t.residual_stride = residual.stride;
  t.lower = static_cast<A>(p.activation.lower);
  const auto point_to = [&](const RowRange& rows, int64_t pixel) {
    t.weight = weight_of(rows);
    t.scale = p.conv.scale ? static_cast<const A*>(p.conv.scale) + rows.row : nullptr;
    t.bias = static_cast<const A*>(p.conv.bias) + rows.row;
    t.x = x_of(rows, pixel);
    t.residual = residual.data ? residual.channel(rows.row) + pixel : nullptr;
    t.y = p.y_planes ? y.data + pixel : y_of(rows, pixel);
    t.y_offsets = p.y_planes ? lists.y_rows + rows.row : lists.y_rows;
  };
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (p.depth * kTileVectors * kVectorBytes));
  int64_t gathered = -1;  // the group whose column is there
  int64_t begin = 0, end = 0;
  do {  // once where a lone pixel is all there is
    end = std::min(tiles.count, begin + block);
    int64_t tile_of_group = 0;
    for (int64_t i = 0; i < p.row_tile_count; ++i) {
      const RowRange& rows = p.row_tiles[i];
      const bool is_last = i + 1 == p.row_tile_count;
      const RowRange& next_rows = p.row_tiles[is_last ? 0 : i + 1];
      for (int64_t tile = begin; tile < end; ++tile) {
        t.ahead = nullptr;
        if (p.far == Far::x && tile + block < tiles.count && tile_of_group < tiles.tile_vectors(tile + block)) {
          t.ahead = x_of(rows, tiles.pixel(tile + block) + tile_of_group * kLanes);
          t.ahead_offsets = t.offsets;
        } else if (p.far == Far::y) {
          const int64_t next = tile + 1 < end ? tile + 1 : is_last ? end : begin;
          if (next < tiles.count) t.ahead = y_of(tile + 1 < end ? rows : next_rows, tiles.pixel(next));
          t.ahead_offsets = lists.y_offsets;
        } else if (tile == 0 && !is_last) {
          t.ahead = weight_of(next_rows);
          t.ahead_offsets = lists.weight_offsets;
        }
        const int64_t tail = tiles.tail(tile);
        t.tail = Simd<A>::first(tail);
        point_to(rows, tiles.pixel(tile));
        run_pointwise_tile(rows.rows, tiles.tile_vectors(tile), tail != kLanes, t);
      }
      if (has_lone_pixel && end == tiles.count) {  // now, while the rows' weights are in the L1 cache
        point_to(rows, tiles.pixels);
        const auto offset = [&](int64_t k) { return t.offsets[k]; };
        if (rows.group != gathered) gather_column(t.x, p.depth, offset, lists.column);
        gathered = rows.group;
        pointwise_pixel(t, rows.rows, lists.column);
      }
      tile_of_group = next_rows.group == rows.group ? tile_of_group + 1 : 0;
    }
    begin = end;
  } while (begin < tiles.count);
}

// Computes some rows, the first of which goes to channel 0 of y where `y_row` names it.
template <class A>
void grouped_pointwise(const GroupedPointwise& p, Range rows, Planes<const A> x, int64_t pixels,
                       Planes<const A> residual, Planes<A> y, int64_t y_row, bool lone_pixel,
                       const PointwiseLists<A>& lists, Far far) {
  int64_t count = 0;
  for (int64_t row = rows.begin; row < rows.end; row += lists.row_tiles[count++].rows) {
    const int64_t group = row / p.group_rows;
    lists.row_tiles[count] = {row, next_channels(std::min(rows.end, (group + 1) * p.group_rows) - row), group};
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    lists.offsets[k] = (p.x_planes ? p.x_planes[k] : k) * x.stride;
    lists.weight_offsets[k] = k * kTileChannels;
    if (far != Far::y) continue;
    const int64_t line = std::min<int64_t>(k, kTileChannels * kTileVectors - 1);
    lists.y_offsets[k] = line % kTileChannels * y.stride + line / kTileChannels * Simd<A>::kLanes;
  }
  pointwise<A>({p, lists.row_tiles, count, y_row, pixels, far}, x, residual, y, lone_pixel, lists);
}

}  // namespace shufflenet::cpu::SHUFFLENET_ISA
