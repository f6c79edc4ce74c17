// How a unit is cut into strips: what strip_planner.h chooses on the host, and pack_kernel.cuh and strip_kernel.cuh
// work by on the device.
//
// A block computes a strip of whole rows of one image, for `slices` slices of the unit; with stride 2, also for as
// large a share of the pooled shortcut. In 16 bits everything is multiplied on tensor cores, in 32 bits (TF32) conv1
// and conv3 are, by mma instructions of 16 pixels x 8 columns. Their operands of weights lie in memory in the order in
// which lanes hold them, as pack_kernel.cuh has put them there, so that one load of 16 bytes brings a lane what it
// needs for 64 bytes of channels.
//
// **Pieces and tiles.** Piece (h, r) is what the shuffle sends from group r of conv1 to slice h: a group of conv3 and
// the channels that it reads. A tile of conv1 is 8 columns of one piece, and so 8 neighbouring slots of the slice. A
// slot is where a channel lies in y1 and y2; where a piece has fewer channels than its tiles have columns, the last
// slots are empty, and hold zeros. This is how the shuffle costs nothing: a whole tile of conv1's result is a whole
// block of y1.
//
// **Scattered.** Where pieces have few channels, as with eight groups, most of their tiles would be empty. A tile of
// conv1 is then 8 columns of a group, side by side, and each of them is stored to a slot of its own: a slice's channels
// lie in order, but for a turn of each block. There are as many columns as slots or more, so that each empty slot is an
// empty column's, and what is left over goes to blocks that nobody reads.
//
// **Layouts.** In channels_last a pixel's channels lie side by side in shared memory, as in x. In the contiguous layout
// a channel's pixels do, x's planes being copied as they are: conv1 transposes its operands as it loads them, and conv3
// computes the transposed product, of which a lane holds neighbouring pixels of a channel.
#pragma once

#include "tiling.h"

namespace shufflenet::cuda {

// A warp multiplies 32 pixels at a time, two tiles of 16, by the same operands of weights.
inline constexpr int kTilesOfItem = 2;
inline constexpr int kItemPixels = kTilesOfItem * kTilePixels;
inline constexpr int kColumns = 8;      // of a tile; a block of y1 or y2 has as many slots
inline constexpr int kBlockBytes = 16;  // of a block of x: what a lane copies, and a row of a matrix that is loaded
inline constexpr int kHalfBytes = 2 * kBlockBytes;  // of a pixel's channels that one mma instruction multiplies
inline constexpr int kPlaceBytes = 4;               // of an entry of StripLayout's tables
inline constexpr int kSectorBytes = 32;             // by which global memory is accessed
// The most tiles of conv1, and pairs of tiles of conv3, that a warp keeps sums of: 2 x 10 tiles take 80 registers,
// which are too many where results are 32 bits wide.
inline constexpr int kMostConv1Tiles = 6;
SHUFFLENET_HOST_DEVICE constexpr int most_conv3_pairs(int element) { return element == 2 ? 5 : 4; }
// Returns the most warps of a block. The more there are, the less time passes without any that has work; but a quarter
// of a multiprocessor's registers are 255 a thread for two warps, and 168 for three, which not all kernels do with.
SHUFFLENET_HOST_DEVICE constexpr int most_strip_warps(int compute_capability, Layout layout) {
  return compute_capability >= 90 && layout == Layout::channels_last ? 12 : 8;
}
inline constexpr int kMostStripWarps = 12;  // of all kernels

struct StripTiling {
  int rows = 0;    // of the result
  int slices = 0;  // a divisor of groups
  int warps = 0;   // an even number, so that the pixels that a warp copies all have the same swizzle
  // With stride 1, pixels of y1 between two rows, of which the ones next to an image's are zeros. One is enough. With
  // eight, each eight pixels of a tile lie in different banks of shared memory, even where the tile goes on in the next
  // row.
  int gap = 0;

  // Return the rows of y1 that `out` rows of the result are made of, and the first one's number in the image, which is
  // -1 where it lies above.
  SHUFFLENET_HOST_DEVICE static int in_rows(const Sizes& s, int out) { return (out - 1) * s.stride + 3; }
  SHUFFLENET_HOST_DEVICE static int first_in_row(const Sizes& s, int out_row) { return out_row * s.stride - 1; }

  SHUFFLENET_HOST_DEVICE int strips(const Sizes& s) const { return ceil_div(s.out_height, rows); }
  SHUFFLENET_HOST_DEVICE int parts(const Sizes& s) const { return s.groups / slices; }
  SHUFFLENET_HOST_DEVICE int64_t blocks(const Sizes& s) const { return s.batch * strips(s) * parts(s); }
};

// How many of something are taken at a time: as few times as the most at a time allows, about equally many each time.
struct Chunks {
  SHUFFLENET_HOST_DEVICE Chunks(int all, int most) : count(ceil_div(all, most)), size(ceil_div(all, count)) {}
  int count, size;
};

// The channels of x, of `element` bytes each, that a group of conv1 reads, as blocks: `skipped` channels before the
// group's own lie in the first one.
struct GroupStart {
  SHUFFLENET_HOST_DEVICE GroupStart(const Sizes& s, int group, int element) {
    const unsigned channel = static_cast<unsigned>(group * s.conv1_depth), of_block = kBlockBytes / element;
    block = static_cast<int>(channel / of_block);
    skipped = static_cast<int>(channel % of_block);
  }
  int block, skipped;
};

// Returns how many fragments the taps of a block of slots take.
SHUFFLENET_HOST_DEVICE constexpr int tap_fragments(int element) { return element == 2 ? 3 * 32 : 5 * 4; }

// Where the parts of a unit lie in the packed weights, in fragments (16 bytes). One part after the other, a part has
//
//   conv1     [conv1_groups][chunks][steps][tiles of the chunk][lane 32]: the operand of 64 bytes of channels
//   affine1   [conv1_groups][tiles][lane % 4]: scale, scale, bias, bias of the two columns that the lane holds sums of
//   slots     [conv1_groups][tiles][lane % 4]: block of y1, byte, block, byte of the slots of the two columns
//   taps      [slices][blocks][3][lane 32]: diagonal operands of the taps 0 3, 1 4, 2 5, 6 7 and 8; of 32 bits
//             [slices][blocks][5][lane % 4]: two taps of the two columns
//   affine2   [slices][blocks][lane % 4]
//   conv3     [slices][chunks][steps][tiles of the chunk][lane 32]
//   affine3   [slices][tiles][lane % 4]; of the transposed product [slices][pairs of tiles][lane / 4], for the two
//             rows, channels, that the lane holds sums of
struct PackedLayout {
  SHUFFLENET_HOST_DEVICE PackedLayout(const Sizes& s, int slices, Layout layout, int element)
      : element(element),
        by_planes(layout == Layout::contiguous),
        scatters(false),
        left_out_mask(by_planes ? 0 : aligned_channels(s, element) - 1),
        piece_tiles(0),
        conv1_tiles(0),
        conv1_halves(0),
        conv1_steps(0),
        blocks(0),
        conv3_pairs(0),
        conv3_halves(0),
        conv3_steps(0),
        conv1_chunk(0),
        conv1_chunks(0),
        conv3_chunk(0),
        conv3_chunks(0),
        conv1_fragments(0),
        conv3_fragments(0),
        has_whole_chunks(false),
        affine1(0),
        slots(0),
        taps(0),
        affine2(0),
        conv3(0),
        affine3(0),
        part(0) {
    // A group of conv1 has conv1_group_rows rows, of which a piece has at most the greatest number of multiples.
    piece_tiles = ceil_div(most_of_a_piece(s, 1), kColumns);
    blocks = s.conv1_groups * piece_tiles;
    // To scatter a tile takes about as long again as to multiply it.
    const int own_blocks = ceil_div(s.slice_channels, kColumns);
    scatters = 3 * own_blocks < 2 * blocks;
    int group_tiles = slices * piece_tiles;
    if (scatters) {
      blocks = own_blocks;
      const int of_columns = ceil_div(most_of_a_piece(s, slices), kColumns);
      const int of_slots = ceil_div(slices * blocks, s.conv1_groups);
      group_tiles = of_columns > of_slots ? of_columns : of_slots;
    }
    const Chunks first(group_tiles, kMostConv1Tiles);
    conv1_chunk = first.size;
    conv1_chunks = first.count;
    conv1_tiles = first.count * first.size;
    int skipped = 0;
    for (int r = 0; r < s.conv1_groups && r < kColumns; ++r) {
      const int mine = GroupStart(s, r, element).skipped;
      skipped = mine > skipped ? mine : skipped;
    }
    is_masked = s.conv1_groups > 1 && (skipped > 0 || s.conv1_depth * element % kHalfBytes != 0);
    conv1_halves = ceil_div((skipped + s.conv1_depth) * element, kHalfBytes);
    conv1_steps = ceil_div(conv1_halves, 2);
    int left_out = 0;  // at most
    for (int h = 0; h < s.groups; ++h) {
      const int mine = channels_left_out(s, h);
      left_out = mine > left_out ? mine : left_out;
    }
    const Chunks last(ceil_div(left_out + s.group_rows, 2 * kColumns), most_conv3_pairs(element));
    conv3_chunk = last.size;
    conv3_chunks = last.count;
    conv3_pairs = last.count * last.size;
    has_whole_chunks = left_out == 0 && s.group_rows == conv3_pairs * 2 * kColumns;
    conv3_halves = ceil_div(blocks * kColumns * element, kHalfBytes);
    conv3_steps = ceil_div(conv3_halves, 2);
    conv1_fragments = conv1_chunk * conv1_steps * 32;
    conv3_fragments = 2 * conv3_chunk * conv3_steps * 32;
    affine1 = s.conv1_groups * conv1_tiles * conv1_steps * 32;
    slots = affine1 + s.conv1_groups * conv1_tiles * 4;
    taps = slots + s.conv1_groups * conv1_tiles * 4;
    affine2 = taps + slices * blocks * tap_fragments(element);
    conv3 = affine2 + slices * blocks * 4;
    affine3 = conv3 + slices * conv3_pairs * 2 * conv3_steps * 32;
    part = affine3 + slices * conv3_pairs * 2 * 4;
  }

  // Returns how many fragments all parts of a unit take.
  SHUFFLENET_HOST_DEVICE int64_t fragments(const Sizes& s, int slices) const {
    return int64_t{part} * (s.groups / slices);
  }

  // Returns the most channels that a group of conv1 has in a part of `slices` slices: with one, the largest piece's.
  SHUFFLENET_HOST_DEVICE static int most_of_a_piece(const Sizes& s, int slices) {
    const int channels = slices * s.slice_channels;
    int most = 0;
    for (int first = 0; first < s.mid_channels; first += channels) {
      for (int r = 0; r < s.conv1_groups; ++r) {
        int count = 0;
        for (int i = 0; i < channels; ++i) count += conv1_group(s, first + i) == r;
        most = count > most ? count : most;
      }
    }
    return most;
  }
  // Returns how many channels of a channels_last result take as many bytes as its pixels are aligned to, or a sector.
  SHUFFLENET_HOST_DEVICE static int aligned_channels(const Sizes& s, int element) {
    int channels = kSectorBytes / element;
    while (s.result_channels % channels != 0) channels /= 2;
    return channels;
  }
  // Returns how many channels of the result lie before a slice's own in its first pair of tiles: where a pair's
  // channels lie side by side in memory, they begin at a sector's boundary, or where pixels do not, as far as these
  // allow.
  SHUFFLENET_HOST_DEVICE int channels_left_out(const Sizes& s, int slice) const {
    return (s.first_conv3_channel + slice * s.group_rows) & left_out_mask;
  }
  // Return the slot of a slice's channel where they are scattered, and the channel of a slot. Block i is turned by i
  // words, so that fewer of the columns that lanes store at a time lie in the same bank.
  SHUFFLENET_HOST_DEVICE static int scattered_slot(int channel) {
    const int block = channel / kColumns;
    return block * kColumns + (channel + 2 * block) % kColumns;
  }
  SHUFFLENET_HOST_DEVICE static int scattered_channel(int slot) {
    const int block = slot / kColumns;
    return block * kColumns + (slot + (kColumns - 2) * block) % kColumns;
  }
  // Return the row of conv1 that the shuffle makes channel `channel`, and the group of conv1 that it belongs to.
  SHUFFLENET_HOST_DEVICE static int conv1_row(const Sizes& s, int channel) {
    return channel % s.shuffle_groups * s.shuffle_rows + channel / s.shuffle_groups;
  }
  SHUFFLENET_HOST_DEVICE static int conv1_group(const Sizes& s, int channel) {
    return conv1_row(s, channel) / (s.mid_channels / s.conv1_groups);
  }

  int element;     // bytes
  bool by_planes;  // whether conv3's product is transposed
  bool scatters;   // whether conv1's columns are stored one by one
  int left_out_mask;
  int piece_tiles;   // tiles of a piece
  int conv1_tiles;   // of a group of conv1 in a part
  int conv1_halves;  // of 32 bytes of channels, that a group of conv1 multiplies; a step has two
  int conv1_steps;
  int blocks;       // of a slice
  int conv3_pairs;  // pairs of tiles of a slice
  int conv3_halves, conv3_steps;
  int conv1_chunk, conv1_chunks;         // tiles that are multiplied at a time, and how many times
  int conv3_chunk, conv3_chunks;         // pairs of tiles
  int conv1_fragments, conv3_fragments;  // of a chunk's weights
  bool has_whole_chunks;                 // whether conv3's pairs of tiles have no columns but a group's
  bool is_masked;                        // whether blocks of x have channels that a group does not read
  int affine1, slots, taps, affine2, conv3, affine3, part;
};

// A block's shared memory, as byte offsets.
struct StripLayout {
  SHUFFLENET_HOST_DEVICE StripLayout(const Sizes& s, const StripTiling& t, Layout layout, int element)
      : StripLayout(s, t, PackedLayout(s, t.slices, layout, element)) {}
  SHUFFLENET_HOST_DEVICE StripLayout(const Sizes& s, const StripTiling& t, const PackedLayout& packed)
      : packed(packed),
        x_pitch(0),
        result_pitch(0),
        x_unit(kBlockBytes),
        result_unit(kBlockBytes),
        own_blocks(s.in_channels * packed.element / kBlockBytes),
        x_blocks(0),
        y1_pixel(kColumns * packed.element),
        y1_row(0),
        y1_odd(0),
        y1_block(0),
        y1(0),
        y2(0),
        y2_bytes(0),
        places(0),
        corners(0),
        bytes(0) {
    // Blocks of a pixel that are read: behind its own channels lie those that the last group's last step reads as well.
    const int last = GroupStart(s, s.conv1_groups - 1, packed.element).block + 2 * packed.conv1_halves;
    x_blocks = static_cast<int>(round_up(last > own_blocks ? last : own_blocks, 2));
    const int in_rows = StripTiling::in_rows(s, t.rows), image_rows = in_rows < s.height ? in_rows : s.height;
    const int64_t pixels = int64_t{image_rows} * s.width;
    if (packed.by_planes) {
      // An odd number of times eight pixels: what is loaded of neighbouring channels then lies in different banks.
      const auto pitch = [&](int64_t pixels) {
        return static_cast<int>((pixels + kColumns - 1) / kColumns | 1) * kColumns * packed.element;
      };
      const int64_t out_pixels = int64_t{t.rows} * s.out_width;
      x_pitch = pitch(pixels);
      result_pitch = s.stride == 1 ? x_pitch : pitch(out_pixels);
      const auto fits = [&](int64_t pixels, int unit) { return pixels * packed.element % unit == 0; };
      // Each strip of x begins and ends at a multiple of its unit.
      const auto fits_x = [&](int unit) {
        bool all = fits(s.in_plane, unit);
        for (int row = 0; row < s.out_height; row += t.rows) {
          const int first = StripTiling::first_in_row(s, row), end = first + StripTiling::in_rows(s, t.rows);
          all = all && (first < 0 || fits(int64_t{first} * s.width, unit)) &&
                (end >= s.height || fits(int64_t{end} * s.width, unit));
        }
        return all;
      };
      while (!fits_x(x_unit)) x_unit /= 2;
      // Results with a residual begin at a row of x in shared memory, unless they are of the whole image.
      const int64_t row = t.rows >= s.out_height ? s.out_plane : s.stride == 1 ? s.width : out_pixels;
      while (!fits(row, result_unit) || !fits(s.out_plane, result_unit)) result_unit /= 2;
    } else {
      // An odd number of 32 bytes: with the swizzle of x_swizzle, eight neighbouring pixels' blocks lie in different
      // banks.
      x_pitch = (ceil_div(own_blocks, 2) | 1) * 2 * kBlockBytes;
    }
    int row = s.width + t.gap;  // pixels
    if (s.stride == 2) {
      // With these remainders eight neighbouring pixels, of which conv1 writes four in each half, lie in different
      // banks; and so do eight pixels of the result, where the next row's follow (if a row has an even number).
      const int odd = next_with_remainder(s.out_width + 1, 5, 8);
      row = next_with_remainder(odd + s.out_width, s.out_width / 2 % 4, 4);
      y1_odd = odd * y1_pixel;
    }
    y1_row = row * y1_pixel;
    const int64_t block_bytes = int64_t{in_rows} * y1_row + y1_pixel;
    y1_block = static_cast<int>(block_bytes);
    // Behind the pixels lie the blocks that are read behind the last one, or with stride 2 a pixel of zeros, which is
    // the longer.
    const int behind = x_blocks * kBlockBytes > x_pitch ? x_blocks * kBlockBytes - x_pitch : 0;
    int64_t end = pixels * x_pitch + (s.stride == 2 ? x_pitch : behind);
    if (packed.by_planes) {
      const int64_t x_bytes = int64_t{x_blocks} * (kBlockBytes / packed.element) * x_pitch;
      const int64_t result_bytes = int64_t{t.slices} * s.group_rows * result_pitch;
      end = s.stride == 2 && result_bytes > x_bytes ? result_bytes : x_bytes;
    }
    end = round_up(end, 32);
    y1 = static_cast<int>(end);
    end += int64_t{s.conv1_groups} * packed.conv1_tiles * block_bytes;
    // With stride 1 the top left tap lies a pixel before the place of the pixel itself, a row further up.
    places = corners = static_cast<int>(end);
    end += round_up(pixels * kPlaceBytes, kBlockBytes);
    if (s.stride == 2) {
      corners = static_cast<int>(end);
      end += round_up(int64_t{t.rows} * s.out_width * kPlaceBytes, kBlockBytes);
    }
    y2 = static_cast<int>(end);
    y2_bytes = packed.conv3_halves * kItemPixels * kHalfBytes;
    end += int64_t{t.warps} * y2_bytes;
    if (packed.by_planes && s.stride == 2) {
      // Before it is made, the pool takes y2's place, with 16 channels at a time or more.
      const int64_t pooled = y2 + int64_t{2 * kColumns} * result_pitch;
      end = pooled > end ? pooled : end;
    }
    bytes = end;
  }

  // Returns where in shared memory a pixel of x has its byte `at`: blocks 2i and 2i + 1 trade places in every other
  // four pixels.
  SHUFFLENET_HOST_DEVICE int x_swizzle(int pixel) const { return (pixel >> 2 & 1) * kBlockBytes; }
  SHUFFLENET_HOST_DEVICE int x_offset(int pixel, int at) const { return pixel * x_pitch + (at ^ x_swizzle(pixel)); }

  // Returns the first number from `n` on that leaves this remainder.
  SHUFFLENET_HOST_DEVICE static int next_with_remainder(int n, int remainder, int divisor) {
    return n + (remainder + divisor - n % divisor) % divisor;
  }

  PackedLayout packed;
  int x_pitch;               // bytes from one pixel of x to the next, or from one plane to the next
  int result_pitch;          // of planes, the bytes from one of the result to the next
  int x_unit, result_unit;   // bytes that planes are copied by: what is copied lies at multiples of them
  int own_blocks, x_blocks;  // that a pixel has, and that are read from its first on
  // Bytes of y1: of a pixel in a block, and from a row to the next. A row has a pixel of zeros at either end where it
  // is read. With stride 2, the pixels in even places come first, and those in odd ones y1_odd behind: what a tap reads
  // of neighbouring pixels then lies side by side.
  int y1_pixel, y1_row, y1_odd;
  int y1_block;      // bytes of a block
  int y1;            // [slices][blocks of a slice], and behind them the blocks of tiles that nobody reads
  int y2, y2_bytes;  // of each warp: [2 * conv3_halves][kItemPixels] blocks of 16 bytes, of 32 bits in lanes' own order
  // Tables: where the pixels of x lie in a block of y1, in bytes, if the strip's first row of x is the first of y1; and
  // where the top left taps of the result's pixels do. To compute these takes more instructions than to read them.
  int places, corners;
  int64_t bytes;  // of it all; may be more than any device has, and then the other members mean nothing
};

}  // namespace shufflenet::cuda
