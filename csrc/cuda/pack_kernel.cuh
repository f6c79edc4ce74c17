// Puts a unit's weights, and the scales and biases that its batch norms and biases come to, in the order in which
// strip_kernel.cuh reads them (PackedLayout in strip.h). With host_device.h it runs on the CPU.
#pragma once

#include "common.cuh"
#ifndef SHUFFLENET_TEST_DEVICE
#include "matrices.cuh"
#endif
#include "strip_products.cuh"
#include "strip_shares.h"

namespace shufflenet::cuda {

template <class T>
struct Packer {
  SHUFFLENET_DEVICE explicit Packer(const PackArguments& arguments)
      : arguments(arguments),
        s(arguments.sizes),
        layout(arguments.layout),
        channels(shared_at<int>(shared_memory(), 0)),
        fragments(static_cast<Fragment*>(arguments.fragments)) {}

  SHUFFLENET_DEVICE void run() {
    if (layout.scatters) {
      find_columns();
    } else {
      find_channels();
    }
    barrier();
    const int64_t all = layout.fragments(s, arguments.slices);
    for (int64_t i = block_index() * kPackThreads + thread_index(); i < all; i += block_count() * kPackThreads) {
      const int part = static_cast<int>(i / layout.part);
      fragments[i] = fragment(part * arguments.slices, static_cast<int>(i - int64_t{part} * layout.part));
    }
  }

 private:
  // Writes which channel of its slice lies in each slot, or -1: a thread the slots of a piece, in the channels' order.
  SHUFFLENET_DEVICE void find_channels() {
    for (int piece = thread_index(); piece < s.groups * s.conv1_groups; piece += kPackThreads) {
      const int slice = piece / s.conv1_groups, group = piece % s.conv1_groups;
      const int slots = layout.piece_tiles * kColumns;
      int found = 0;
      for (int i = 0; i < s.slice_channels; ++i) {
        if (PackedLayout::conv1_group(s, slice * s.slice_channels + i) == group) channels[piece * slots + found++] = i;
      }
      for (; found < slots; ++found) channels[piece * slots + found] = -1;
    }
  }

  // Writes which channel each column of a group has in a part, in the channels' order: a thread a group's. The empty
  // columns of a part are numbered from -1 down.
  SHUFFLENET_DEVICE void find_columns() {
    const int columns = layout.conv1_tiles * kColumns, part_channels = arguments.slices * s.slice_channels;
    for (int i = thread_index(); i < s.groups / arguments.slices * s.conv1_groups; i += kPackThreads) {
      const int group = i % s.conv1_groups, first = i / s.conv1_groups * part_channels;
      int found = 0, of_groups_before = 0;
      for (int channel = first; channel < first + part_channels; ++channel) {
        const int its_group = PackedLayout::conv1_group(s, channel);
        of_groups_before += its_group < group;
        if (its_group == group) channels[i * columns + found++] = channel;
      }
      int empty = group * columns - of_groups_before;
      for (; found < columns; ++found) channels[i * columns + found] = -1 - empty++;
    }
  }
  // Returns what find_columns has written for a column of a group, in the part that begins with slice `first_slice`.
  SHUFFLENET_DEVICE int column(int first_slice, int group, int i) const {
    const int part = first_slice / arguments.slices;
    return channels[(part * s.conv1_groups + group) * layout.conv1_tiles * kColumns + i];
  }

  // Returns the channel of y1 that a slot of a slice has, or -1.
  SHUFFLENET_DEVICE int channel_of(int slice, int slot) const {
    if (layout.scatters) {
      const int i = PackedLayout::scattered_channel(slot);
      return i < s.slice_channels ? slice * s.slice_channels + i : -1;
    }
    if (slot >= layout.blocks * kColumns) return -1;
    const int i = channels[slice * layout.blocks * kColumns + slot];
    return i < 0 ? -1 : slice * s.slice_channels + i;
  }

  // Return the channel whose sum is in a column of a tile of conv1, or of conv3; -1 if there is none.
  SHUFFLENET_DEVICE int conv1_channel(int first_slice, int group, int tile, int column_of_tile) const {
    if (layout.scatters) return most(-1, column(first_slice, group, tile * kColumns + column_of_tile));
    const int slice = tile / layout.piece_tiles;
    if (slice >= arguments.slices) return -1;
    return channel_of(
        first_slice + slice, (group * layout.piece_tiles + tile % layout.piece_tiles) * kColumns + column_of_tile);
  }
  // A lane holds the sums of columns 2 * (lane % 4) and the one behind, which in the two tiles of a pair are four
  // neighbouring channels; of the transposed product it holds one column of either tile.
  SHUFFLENET_DEVICE int conv3_channel(int slice, int tile, int column) const {
    const int place = layout.by_planes ? tile * kColumns + column
                                       : tile / 2 * 2 * kColumns + column / 2 * 4 + tile % 2 * 2 + column % 2;
    const int channel = place - layout.channels_left_out(s, slice);
    return channel >= 0 && channel < s.group_rows ? slice * s.group_rows + channel : -1;
  }

  // Returns fragment `i` of the part that begins with slice `first_slice`.
  SHUFFLENET_DEVICE Fragment fragment(int first_slice, int i) const {
    if (i < layout.affine1) return conv1_fragment(first_slice, i);
    if (i < layout.slots) {
      i -= layout.affine1;
      const int group = i / 4 / layout.conv1_tiles, tile = i / 4 % layout.conv1_tiles;
      return affine_fragment(arguments.conv1, [&](int odd) {
        const int channel = conv1_channel(first_slice, group, tile, i % 4 * 2 + odd);
        return channel < 0 ? -1 : PackedLayout::conv1_row(s, channel);
      });
    }
    if (i < layout.taps) return slots_fragment(first_slice, i - layout.slots);
    if (i < layout.affine2) {
      i -= layout.taps;
      if constexpr (kIsWide<T>) {
        return pairs_of_taps(first_slice, i);
      } else {
        return diagonal_taps(first_slice, i);
      }
    }
    if (i < layout.conv3) {
      i -= layout.affine2;
      const int slice = first_slice + i / 4 / layout.blocks, block = i / 4 % layout.blocks;
      return affine_fragment(
          arguments.conv2, [&](int odd) { return channel_of(slice, block * kColumns + i % 4 * 2 + odd); });
    }
    if (i < layout.affine3) return conv3_fragment(first_slice, i - layout.conv3);
    i -= layout.affine3;
    const int slice = first_slice + i / 4 / (2 * layout.conv3_pairs), tile = i / 4 % (2 * layout.conv3_pairs);
    return affine_fragment(arguments.conv3, [&](int odd) {
      return layout.by_planes ? conv3_channel(slice, tile / 2 * 2 + odd, i % 8)
                              : conv3_channel(slice, tile, i % 4 * 2 + odd);
    });
  }

  // Returns the blocks of y1, and the bytes of a block's pixel, of the slots of two columns.
  SHUFFLENET_DEVICE Fragment slots_fragment(int first_slice, int fragment) const {
    const int group = fragment / 4 / layout.conv1_tiles, tile = fragment / 4 % layout.conv1_tiles;
    const int empty_slots = layout.blocks * kColumns - s.slice_channels;  // of a slice
    Fragment f;
    SHUFFLENET_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const int in_tile = fragment % 4 * 2 + odd;
      if (!layout.scatters) {
        f.words[2 * odd] = block_of_tile(group, tile);
        f.words[2 * odd + 1] = in_tile * kElement;
        continue;
      }
      const int channel = column(first_slice, group, tile * kColumns + in_tile);
      const int empty = -1 - channel, behind = empty - arguments.slices * empty_slots;
      int slice = channel / s.slice_channels - first_slice, i = channel % s.slice_channels;
      if (channel < 0 && behind < 0) {
        slice = empty / empty_slots;
        i = s.slice_channels + empty % empty_slots;
      } else if (channel < 0) {
        slice = arguments.slices;
        i = behind;
      }
      const int slot = PackedLayout::scattered_slot(i);
      f.words[2 * odd] = slice * layout.blocks + slot / kColumns;
      f.words[2 * odd + 1] = slot % kColumns * kElement;
    }
    return f;
  }

  // Returns the block of y1 that a tile of a group of conv1 is: slices have theirs side by side. Behind all slices' lie
  // those of the tiles that fill up a group's last chunk.
  SHUFFLENET_DEVICE int block_of_tile(int group, int tile) const {
    const int tiles = arguments.slices * layout.piece_tiles, more = tile - tiles;
    if (more >= 0) return arguments.slices * layout.blocks + group * (layout.conv1_tiles - tiles) + more;
    return tile / layout.piece_tiles * layout.blocks + group * layout.piece_tiles + tile % layout.piece_tiles;
  }

  // Returns the scales and the biases of two channels. Empty slots have -0, by which the kernel knows them, and 0.
  template <class ChannelOf>
  SHUFFLENET_DEVICE Fragment affine_fragment(const ConvolutionPointers& conv, const ChannelOf& channel_of) const {
    Fragment f;
    SHUFFLENET_UNROLL
    for (int odd = 0; odd < 2; ++odd) {
      const int channel = channel_of(odd);
      const Affine<float> constants = channel < 0 ? Affine<float>{-0.f, 0.f} : affine<T>(conv, channel);
      f.words[odd] = bits_of(constants.scale);
      f.words[2 + odd] = bits_of(constants.bias);
    }
    return f;
  }

  // Returns a lane's operand of kRows rows, of column lane / 4: a word holds the rows that the lane has of 16 bytes of
  // them. weight_of(row, column) gives the weights' bits.
  template <class WeightOf>
  SHUFFLENET_DEVICE static Fragment operand(int lane, const WeightOf& weight_of) {
    Fragment f;
    SHUFFLENET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = kInWord * (4 * i + lane % 4);
      f.words[i] = weight_of(row, lane / 4);
      if constexpr (!kIsWide<T>) f.words[i] |= weight_of(row + 1, lane / 4) << 16;
    }
    return f;
  }

  SHUFFLENET_DEVICE Fragment conv1_fragment(int first_slice, int i) const {
    const int lane = i % 32, in_chunk = i / 32 % layout.conv1_chunk;
    i /= 32 * layout.conv1_chunk;
    const int step = i % layout.conv1_steps, chunk = i / layout.conv1_steps % layout.conv1_chunks;
    const int group = i / layout.conv1_steps / layout.conv1_chunks;
    const int skipped = GroupStart(s, group, kElement).skipped, tile = chunk * layout.conv1_chunk + in_chunk;
    return operand(lane, [&](int row, int column) -> uint32_t {
      const int channel = conv1_channel(first_slice, group, tile, column), depth = step * kRows + row - skipped;
      if (channel < 0 || depth < 0 || depth >= s.conv1_depth) return 0;
      return factor(arguments.conv1, PackedLayout::conv1_row(s, channel), s.conv1_depth, depth);
    });
  }

  // Word 2 * t + c of a lane, of the five fragments that a block has, is tap t of the fragment's two, of the lane's
  // column c.
  SHUFFLENET_DEVICE Fragment pairs_of_taps(int first_slice, int i) const {
    const int fifth = i / 4 % 5, block = i / kTaps % layout.blocks, slice = i / kTaps / layout.blocks;
    Fragment f = {};
    SHUFFLENET_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int channel = channel_of(first_slice + slice, block * kColumns + i % 4 * 2 + w % 2),
                tap = 2 * fifth + w / 2;
      if (channel >= 0 && tap < 9) f.words[w] = bits_at(arguments.conv2, channel, 9, tap);
    }
    return f;
  }

  // Word w of a lane, of the three fragments that a block has, is the operand of tap tap_of(w): rows are slots, too,
  // and only what is on the diagonal is not 0.
  SHUFFLENET_DEVICE Fragment diagonal_taps(int first_slice, int i) const {
    const int lane = i % 32, third = i / 32 % 3, block = i / kTaps % layout.blocks, slice = i / kTaps / layout.blocks;
    const int column = lane / 4, channel = channel_of(first_slice + slice, block * kColumns + column);
    Fragment f = {};
    if (channel < 0 || column / 2 != lane % 4) return f;
    SHUFFLENET_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int word = third * 4 + w;
      if (word >= 9) break;
      const int tap = word < 6 ? word / 2 + word % 2 * 3 : word;
      f.words[w] = bits_at(arguments.conv2, channel, 9, tap) << 16 * (column % 2);
    }
    return f;
  }

  SHUFFLENET_DEVICE Fragment conv3_fragment(int first_slice, int i) const {
    const int lane = i % 32, in_chunk = i / 32 % (2 * layout.conv3_chunk);
    i /= 64 * layout.conv3_chunk;
    const int step = i % layout.conv3_steps, chunk = i / layout.conv3_steps % layout.conv3_chunks;
    const int slice = first_slice + i / layout.conv3_steps / layout.conv3_chunks;
    const int tile = chunk * 2 * layout.conv3_chunk + in_chunk;
    return operand(lane, [&](int row, int column) -> uint32_t {
      // ExactDepthwise stores y2 in this order.
      const int slot = kIsWide<T> ? row / 8 * 8 + row % 4 * 2 + row % 8 / 4 : row;
      const int channel = conv3_channel(slice, tile, column), from = channel_of(slice, step * kRows + slot);
      if (channel < 0 || from < 0) return 0;
      return factor(arguments.conv3, channel, s.slice_channels, from - slice * s.slice_channels);
    });
  }

  // Return the bits of a weight: as they are, and as an mma instruction takes them.
  SHUFFLENET_DEVICE static uint32_t bits_at(const ConvolutionPointers& conv, int row, int depth, int i) {
    const T weight = static_cast<const T*>(conv.weight)[int64_t{row} * depth + i];
    if constexpr (kIsWide<T>) {
      return bits_of(weight);
    } else {
      return weight.bits;
    }
  }
  SHUFFLENET_DEVICE static uint32_t factor(const ConvolutionPointers& conv, int row, int depth, int i) {
    uint32_t bits[1] = {bits_at(conv, row, depth, i)};
    round_operands<T>(bits);
    return bits[0];
  }

  static constexpr int kElement = sizeof(T), kInWord = kWordBytes / kElement;
  static constexpr int kRows = 2 * kHalfBytes / kElement;  // of a step
  static constexpr int kTaps = tap_fragments(kElement);

  const PackArguments& arguments;
  const Sizes& s;
  const PackedLayout& layout;
  const Shared<int> channels;
  Fragment* const fragments;
};

}  // namespace shufflenet::cuda
