// How the threads of a block share the work on a strip (strip.h), and what kernels by strips are passed.
#pragma once

#include "strip.h"

namespace shufflenet::cuda {

// The least bytes that planes are copied by, and how many such units of a part of a plane a lane copies at a time, each
// of another sector: what 4 rows of 7 pixels of 16 bits take.
inline constexpr int kLeastUnitBytes = 2;
inline constexpr int kSectorsInARow = 3;

// How the threads of a block share the copying of some planes, of each `pixels` pixels of `plane`, in units of
// unit_bytes. They stand side by side over as many planes as they can, so that they go from plane to plane without
// dividing. Whole planes lie one behind the other in memory. Where sectors are to be filled, a warp's units begin at
// one: as many planes are taken together as begin at one again, and of parts of planes each has as many slots as its
// units take in sectors wherever it begins, or where units are elements, a slot for some of them. Slots without a unit
// are left out.
struct PlaneCopy {
  SHUFFLENET_HOST_DEVICE PlaneCopy(int pixels, int plane, int element, int unit_bytes, int threads, bool fills_sectors)
      : together(1), is_whole(pixels == plane) {
    const int in_a_sector = fills_sectors ? kSectorBytes / unit_bytes : 1;
    while (fills_sectors && plane * element * together % kSectorBytes != 0) together *= 2;
    units = pixels * element / unit_bytes;
    in_a_row = fills_sectors && !is_whole && unit_bytes == kLeastUnitBytes ? kSectorsInARow : 1;
    slots = is_whole ? units : ceil_div(ceil_div(units + in_a_sector - 1, in_a_sector), in_a_row) * in_a_sector;
    lanes = ceil_div(Chunks(slots * together, threads).size, in_a_sector) * in_a_sector;
    lanes = lanes < slots * together ? lanes : slots * together;
    side_by_side = threads / lanes;
  }
  int together;      // planes
  bool is_whole;     // whether all pixels of a plane are copied
  int units, slots;  // of a plane
  int in_a_row;      // units of a slot, which lie a sector apart
  int lanes;         // threads that share the slots of planes taken together: one each, or every so many
  int side_by_side;
};

// How the pool of planes is shared: tiles of 8 columns of the result, by some rows, to which a warp goes on where they
// begin at the same place in a block of x as the first one does.
struct PlanePoolTiles {
  SHUFFLENET_HOST_DEVICE PlanePoolTiles(const Sizes& s, int out_rows, int warps)
      : in_row(ceil_div(s.out_width, kColumns)),
        rows(out_rows,
             s.width % 4 != 0 ? 1 : ceil_div(out_rows * in_row, warps > in_row ? warps / in_row * in_row : in_row)) {}
  int in_row;
  Chunks rows;
};

inline constexpr int kPackThreads = 256;

// Returns the bytes of shared memory that a block of pack_kernel.cuh needs: for each slot of the unit, or if scattered
// for each column of conv1 in all parts, its channel.
SHUFFLENET_HOST_DEVICE inline int64_t pack_shared_bytes(const Sizes& s, int slices, const PackedLayout& layout) {
  const int tiles =
      layout.scatters ? s.groups / slices * s.conv1_groups * layout.conv1_tiles : s.groups * layout.blocks;
  return int64_t{tiles} * kColumns * static_cast<int64_t>(sizeof(int));
}

struct PackArguments {
  Sizes sizes;
  int slices;
  PackedLayout layout;
  ConvolutionPointers conv1, conv2, conv3;
  void* fragments;
};

// How warps share a phase. The host computes it.
struct WarpShares {
  WarpShares(int warps, int pieces)
      : pieces(pieces),
        teams(warps > pieces ? warps / pieces : 1),
        step(warps < pieces ? warps : pieces),
        pixel_step(teams * kItemPixels) {
    for (int warp = 0; warp < warps; ++warp) {
      const int team = warp / pieces;
      // A warp that is left over has no piece.
      of[warp] = {team < teams ? warp - team * pieces : pieces, team * kItemPixels};
    }
  }

  int pieces, teams;
  // What a warp does: of `pieces` (groups or slices), those from `first` on, `step` apart; of the pixels, the items
  // from `pixel` on, `pixel_step` pixels apart.
  struct Share {
    int first, pixel;
  };
  Share of[kMostStripWarps];
  int step, pixel_step;
};

// What all blocks have in common: dividing takes a warp many instructions.
struct StripConstants {
  StripConstants(const Sizes& s, const StripTiling& t, const StripLayout& layout)
      : strips(t.strips(s)),
        parts(t.parts(s)),
        image_bytes(static_cast<uint32_t>(s.in_channels * s.in_plane) * layout.packed.element),
        result_bytes(static_cast<uint32_t>(s.result_channels * s.out_plane) * layout.packed.element),
        copy_lanes(layout.own_blocks < 32 ? layout.own_blocks : 32),
        copy_pixels(32 / copy_lanes * 4),
        copy_bytes(t.warps * copy_pixels * s.in_channels * layout.packed.element),
        copy_pitch(t.warps * copy_pixels * layout.x_pitch),
        by_copy_lanes(copy_lanes),
        framing_warps(t.warps < 4 ? 1 : 2),
        clears_right(s.stride == 1 ? t.gap > 1 : s.width % 2 != 0),
        y1_corner(layout.y1 - (s.stride == 1 ? layout.y1_pixel : 0)),
        y1_end(layout.y1 + s.conv1_groups * layout.packed.conv1_tiles * layout.y1_block),
        by_strips(strips),
        by_parts(parts),
        by_width(s.width),
        by_out_width(s.out_width),
        by_conv1_chunks(layout.packed.conv1_chunks),
        shares_fours(s.group_rows % 4 != 0 || s.first_conv3_channel % 4 != 0),
        conv1(t.warps, s.conv1_groups * layout.packed.conv1_chunks),
        conv3(t.warps, t.slices) {}
  int strips, parts;
  uint32_t image_bytes, result_bytes;  // of an image of x and of the result; the planner sees that they fit
  // In channels_last: how many lanes copy a pixel, each a block at a time; how many pixels a warp copies before it goes
  // on, and by how many bytes it does in memory and in shared memory.
  int copy_lanes, copy_pixels, copy_bytes, copy_pitch;
  Divisor by_copy_lanes;
  int framing_warps;            // how many warps clear the frame of y1
  bool clears_right;            // whether the frame has a pixel of its own behind each row
  int y1_corner;                // what StripLayout::corners are counted from
  int y1_end;                   // where y1 ends in shared memory
  Divisor by_strips, by_parts;  // blocks: the planner sees to their range
  Divisor by_width, by_out_width, by_conv1_chunks;
  bool shares_fours;  // whether four neighbouring channels of the result may be several slices'
  WarpShares conv1, conv3;
};

struct StripArguments {
  StripArguments(const Sizes& sizes, const StripTiling& tiling, const StripLayout& layout, const void* x,
                 const void* fragments, void* result)
      : sizes(sizes),
        tiling(tiling),
        layout(layout),
        constants(sizes, tiling, layout),
        x(x),
        fragments(fragments),
        result(result) {}

  Sizes sizes;
  StripTiling tiling;
  // Computed on the host, so that the kernel reads them as constants.
  StripLayout layout;
  StripConstants constants;
  const void* x;
  const void* fragments;
  void* result;
};

}  // namespace shufflenet::cuda
