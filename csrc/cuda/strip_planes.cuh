// A strip of x in the contiguous layout: a channel's pixels lie side by side in shared memory too. Results take the
// places of x's pixels that they are added to, or with stride 2 that of x, once it has been pooled. From there they go
// to global memory in runs of whole planes or rows, as x came: so that accesses fill their sectors.
#pragma once

#include "strip_plane_pool.cuh"
#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

template <class T>
struct StripPlanes : StripStaging {
  SHUFFLENET_DEVICE explicit StripPlanes(const StripArguments& arguments) : StripStaging(arguments) {}

  static constexpr bool kTransposed = true;
  static constexpr int kElement = sizeof(T), kBlockChannels = kBlockBytes / kElement;

  // Starts to copy the strip's rows of x.
  SHUFFLENET_DEVICE void copy_x() const {
    const char* const from = x_of_image() + image_row * s.width * kElement;
    const Runs runs = {s.in_channels, image_rows * s.width, s.in_plane, layout.x_pitch};
    switch (layout.x_unit) {
      case 16: copy_x_in<16>(from, runs); break;
      case 8: copy_x_in<8>(from, runs); break;
      case 4: copy_x_in<4>(from, runs); break;
      default:
        if constexpr (!kIsWide<T>) copy_x_in_elements(from, runs);
    }
    commit_copies();
  }

  // Zeroes what conv1 loads without using it: the pixels behind a channel's last one, and the channels behind x's own;
  // as one thread of several.
  SHUFFLENET_DEVICE void clear_unused_x(int thread, int threads) const {
    const int pixels = image_rows * s.width, end_pixel = ceil_div(pixels, kColumns) * kColumns;
    SHUFFLENET_NO_UNROLL
    for (int channel = thread; channel < s.in_channels && pixels < end_pixel; channel += threads) {
      const uint32_t plane = base + channel * layout.x_pitch, plane_end = plane + end_pixel * kElement;
      SHUFFLENET_NO_UNROLL
      for (uint32_t at = plane + pixels * kElement; at < plane_end; at += kElement)
        store_element(at, element_of<T>({}, 0));
    }
    const int begin = s.in_channels * layout.x_pitch, end = layout.x_blocks * kBlockChannels * layout.x_pitch;
    SHUFFLENET_NO_UNROLL
    for (int at = begin + thread * kBlockBytes; at < end; at += threads * kBlockBytes) clear_block(base + at);
  }

  // Returns the address that the lane passes to load the channels of a block of x, and of the next one, of 16 pixels
  // from `pixel` on. Behind the last pixel it is that of the last eight.
  SHUFFLENET_DEVICE uint32_t operand_row(int pixel, int block, int last) const {
    const int last_eight = last / 8 * 8;
    if constexpr (kIsWide<T>) {
      const int channel = block * kBlockChannels + lane % 4, mine = least(pixel, last_eight) + lane / 4;
      return base + channel * layout.x_pitch + mine * kElement;
    }
    const int channel = (block + lane / 16) * kBlockChannels + lane % 8;
    return base + channel * layout.x_pitch + least(pixel + lane / 8 % 2 * 8, last_eight) * kElement;
  }
  SHUFFLENET_DEVICE uint32_t bytes_to_next_pixel() const { return kElement; }
  SHUFFLENET_DEVICE auto operand(const uint32_t (&row)[kTilesOfItem], int pixel) const {
    const uint32_t half_bytes = 2 * kBlockChannels * layout.x_pitch;
    if constexpr (kIsWide<T>) {
      WidePlaneOperand<T> operand = {{row[0], row[1]}, {}, half_bytes};
      SHUFFLENET_UNROLL
      for (int m = 0; m < kTilesOfItem; ++m) {
        const bool has_last = pixel + m * kTilePixels + 8 < image_rows * s.width;
        operand.eight_bytes[m] = has_last ? 8 * kElement : 0;
      }
      return operand;
    } else {
      return PlaneOperand{{row[0], row[1]}, half_bytes};
    }
  }

  // Returns the pixel of the result that conv3's items begin at, so that their pairs of pixels are words of x.
  SHUFFLENET_DEVICE int first_item() const { return -(first_pixel_of_result() % 2); }
  // Which of the constants of a pair of tiles of conv3 the lane takes.
  SHUFFLENET_DEVICE int affine3_lane() const { return lane / 4; }
  // Returns a sum that is NaN if any channel of y2 is, in any pixel of the lane.
  template <int kTiles>
  SHUFFLENET_DEVICE static float any_sum(const Sums<kTiles>& sums) {
    float sum = 0;
    SHUFFLENET_UNROLL
    for (int m = 0; m < kTilesOfItem; ++m) {
      SHUFFLENET_UNROLL
      for (int n = 0; n < 2; ++n) sum += sums[m][n][0] + sums[m][n][1];
    }
    return sum;
  }

  // Pools the part's share of x with stride 2, as conv3's results take its place: by way of where y2 will be, as many
  // channels at a time as it holds.
  SHUFFLENET_DEVICE void before_results() {
    if (s.stride == 1) return;
    const int pairs = ceil_div(s.in_channels, 2 * kColumns), parts = constants.parts;
    const int end = pairs * (part + 1) / parts, pair_bytes = 2 * kColumns * layout.result_pitch;
    const int room = static_cast<int>(layout.bytes - layout.y2) / pair_bytes;
    const PlanePool<T> pool(*this, base + layout.y2);
    SHUFFLENET_NO_UNROLL
    for (int pair = pairs * part / parts; pair < end; pair += room) {
      const int last = least(pair + room, end), first_channel = pair * 2 * kColumns;
      pool.run(pair, last);
      barrier();
      copy_results(s.first_pooled_channel + first_channel, least(last * 2 * kColumns, s.in_channels) - first_channel,
                   base + layout.y2);
      barrier();
    }
  }

  // Where in shared memory the results of 32 pixels of a slice go, with x added if the stride is 1, kPairs pairs of
  // tiles at a time.
  template <int kPairs>
  struct Results {
    SHUFFLENET_DEVICE Results(const StripPlanes& strip, int first_pixel, int slice)
        : pitch(strip.layout.result_pitch), channel(strip.lane / 4) {
      const Sizes& s = strip.s;
      const int pixel = first_pixel + strip.lane % 4 * 2;
      at = strip.result() + (slice * s.group_rows + channel) * pitch + pixel * kElement;
      adds_residual = s.stride == 1;
      pixels_left = strip.out_rows * s.out_width - pixel;
      channels_left = s.group_rows;
    }

    SHUFFLENET_DEVICE void advance(int pixels) {
      at += pixels * kElement;
      pixels_left -= pixels;
    }

    // Puts a chunk of the channels in its place, and goes on to the next one.
    SHUFFLENET_DEVICE void write(const Sums<2 * kPairs>& sums, const Fragment* affine) {
      if (adds_residual) {
        write_as<true>(sums, affine);
      } else {
        write_as<false>(sums, affine);
      }
      channels_left -= kPairs * 2 * kColumns;
      at += kPairs * 2 * kColumns * pitch;
    }

   private:
    // Channels that are not there may be in the last pair of tiles where there is one chunk, else in the last chunk.
    template <bool kResidual>
    SHUFFLENET_DEVICE void write_as(const Sums<2 * kPairs>& sums, const Fragment* affine) const {
      constexpr int kChannels = kPairs * 2 * kColumns;
      if (channels_left >= kChannels) {
        write_pairs<0, kResidual>(sums, affine);
      } else if (channels_left > kChannels - 2 * kColumns) {
        write_pairs<1, kResidual>(sums, affine);
      } else {
        write_pairs<kPairs, kResidual>(sums, affine);
      }
    }
    // Finishes the sums, and adds them to what is in their places if kResidual. Of the last kUnsure pairs of tiles only
    // channels that are there; and pairs of which a pixel is: what the other one overwrites nobody reads any more.
    template <int kUnsure, bool kResidual>
    SHUFFLENET_DEVICE void write_pairs(const Sums<2 * kPairs>& sums, const Fragment* affine) const {
      Vector4 constants[kPairs];
      for_each<0, kPairs>([&](auto pair) {
        constants[decltype(pair)::value] = load_floats<decltype(pair)::value * 8>(affine);
      });
      for_each<0, 2 * kTilesOfItem>([&](auto eighth) {
        constexpr int kEight = decltype(eighth)::value, kBytes = kEight * 8 * kElement;
        if (kEight * 8 >= pixels_left) return;
        SHUFFLENET_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          Pair<T> pairs[2];
          finish_transposed<T, !kResidual>(sums[kEight / 2][2 * pair + kEight % 2], constants[pair], pairs);
          SHUFFLENET_UNROLL
          for (int half = 0; half < 2; ++half) {
            if (pair >= kPairs - kUnsure && (2 * pair + half) * kColumns + channel >= channels_left) continue;
            const uint32_t to = at + (2 * pair + half) * kColumns * pitch;
            if constexpr (kResidual) add_relu_to<kBytes>(to, pairs[half], T{});
            store_pair<kBytes>(to, pairs[half]);
          }
        }
      });
    }

    uint32_t at;  // of the lane's first pixel and channel
    int pitch, channel;
    int pixels_left, channels_left;  // from the lane's first pixel on, from the chunk's first channel on
    bool adds_residual;
  };

  // Copies the results of all warps to global memory.
  SHUFFLENET_DEVICE void after_results() const {
    barrier();
    const int channels = t.slices * s.group_rows;
    copy_results(s.first_conv3_channel + part * channels, channels, result());
  }

 private:
  // How many copies follow each other without a loop's instructions, and how many loads are in flight where there are
  // no asynchronous copies.
  static constexpr int kCopiesInARow = 8;

  // Returns the pixel of x, in shared memory, that the result's first one is added to.
  SHUFFLENET_DEVICE int first_pixel_of_result() const { return s.stride == 1 ? rows_above_result() * s.width : 0; }
  // Returns where in shared memory conv3's results are: the first pixel of the part's first channel.
  SHUFFLENET_DEVICE uint32_t result() const {
    if (s.stride == 2) return base;
    return base + part * t.slices * s.group_rows * layout.x_pitch + first_pixel_of_result() * kElement;
  }

  // Copies what the strip has of some channels of the result, from `from` on in shared memory.
  SHUFFLENET_DEVICE void copy_results(int channel, int channels, uint32_t from) const {
    char* const to = result_of_image() + (int64_t{channel} * s.out_plane + out_row * s.out_width) * kElement;
    const Runs runs = {channels, out_rows * s.out_width, s.out_plane, layout.result_pitch};
    switch (layout.result_unit) {
      case 16: copy_result_in<16>(to, from, runs); break;
      case 8: copy_result_in<8>(to, from, runs); break;
      case 4: copy_result_in<4>(to, from, runs); break;
      default:
        if constexpr (!kIsWide<T>) copy_result_in<kLeastUnitBytes>(to, from, runs);
    }
  }

  // The pixels that are copied of some planes, of `plane` pixels each: the first `pixels` of each.
  struct Runs {
    int planes, pixels, plane, pitch;
  };
  // A thread's share of copying runs: a slot's units of some planes, and the same ones of others, `count` times.
  struct CopyShare {
    uint32_t begin, step;         // bytes in shared memory, from the first plane's first pixel on
    int64_t global, global_step;  // the same in memory
    int count;
    bool has[kSectorsInARow];  // which of the units there are
  };
  // Calls copy(share) for what the thread copies in units of kBytes, as PlaneCopy shares it. `memory` is where the
  // first run begins; if kFillsSectors, a thread's slots lie where sectors begin before it.
  template <int kBytes, bool kFillsSectors, class Copy>
  SHUFFLENET_DEVICE void for_each_share(const Runs& runs, const char* memory, const Copy& copy) const {
    const PlaneCopy by(runs.pixels, runs.plane, kElement, kBytes, t.warps * 32, kFillsSectors);
    const int thread = warp * 32 + lane, mine = thread / by.lanes;
    if (mine == by.side_by_side) return;
    const int step = by.side_by_side * by.together, plane_bytes = runs.plane * kElement;
    SHUFFLENET_NO_UNROLL
    for (int slot = thread - mine * by.lanes; slot < by.slots * by.together; slot += by.lanes) {
      const int in_group = kFillsSectors ? slot / by.slots : 0, plane = mine * by.together + in_group;
      int unit = slot - in_group * by.slots;
      CopyShare share = {};
      share.has[0] = true;
      if (kFillsSectors && !by.is_whole) {
        constexpr int kInASector = kSectorBytes / kBytes;
        const auto run = reinterpret_cast<uintptr_t>(memory) + static_cast<uint32_t>(plane * plane_bytes);
        if (kBytes == kLeastUnitBytes) unit += unit / kInASector * (kSectorsInARow - 1) * kInASector;
        unit -= static_cast<int>(run % kSectorBytes) / kBytes;
        bool any = false;
        SHUFFLENET_UNROLL
        for (int i = 0; i < (kBytes == kLeastUnitBytes ? kSectorsInARow : 1); ++i) {
          share.has[i] = static_cast<uint32_t>(unit + i * kInASector) < static_cast<uint32_t>(by.units);
          any = any || share.has[i];
        }
        if (!any) continue;
      }
      share.count = ceil_div(runs.planes - plane, step);
      share.begin = plane * runs.pitch + unit * kBytes;
      share.step = step * runs.pitch;
      share.global = int64_t{plane} * plane_bytes + unit * kBytes;
      share.global_step = int64_t{step} * plane_bytes;
      copy(share);
    }
  }
  // Calls copy() `count` times, most of them without a loop's own instructions.
  template <class Copy>
  SHUFFLENET_DEVICE static void repeat(int count, const Copy& copy) {
    SHUFFLENET_NO_UNROLL
    for (; count >= kCopiesInARow; count -= kCopiesInARow) {
      SHUFFLENET_UNROLL
      for (int i = 0; i < kCopiesInARow; ++i) copy();
    }
    for_each<0, 3>([&](auto bit) {
      constexpr int kCopies = 1 << decltype(bit)::value;
      if ((count & kCopies) == 0) return;
      SHUFFLENET_UNROLL
      for (int i = 0; i < kCopies; ++i) copy();
    });
  }
  template <int kBytes>
  SHUFFLENET_DEVICE void copy_x_in(const char* from, const Runs& runs) const {
    for_each_share<kBytes, false>(runs, from, [&](const CopyShare& share) {
      const char* source = from + share.global;
      uint32_t to = base + share.begin;
      repeat(share.count, [&] {
        copy_unit_async<kBytes>(to, source);
        source += share.global_step;
        to += share.step;
      });
    });
  }
  // There are no asynchronous copies of elements: some loads are started before the first of them is stored.
  SHUFFLENET_DEVICE void copy_x_in_elements(const char* from, const Runs& runs) const {
    for_each_share<kLeastUnitBytes, false>(runs, from, [&](const CopyShare& share) {
      const char* source = from + share.global;
      uint32_t to = base + share.begin;
      const auto copy_some = [&](int count, auto is_whole) {
        uint16_t values[kCopiesInARow];
        SHUFFLENET_UNROLL
        for (int i = 0; i < kCopiesInARow; ++i) {
          if (decltype(is_whole)::value || i < count) values[i] = *reinterpret_cast<const uint16_t*>(source);
          source += share.global_step;
        }
        SHUFFLENET_UNROLL
        for (int i = 0; i < kCopiesInARow; ++i) {
          if (decltype(is_whole)::value || i < count) store_element(to, values[i]);
          to += share.step;
        }
      };
      int left = share.count;
      SHUFFLENET_NO_UNROLL
      for (; left >= kCopiesInARow; left -= kCopiesInARow) copy_some(left, std::true_type{});
      if (left > 0) copy_some(left, std::false_type{});
    });
  }
  template <int kBytes>
  SHUFFLENET_DEVICE void copy_result_in(char* to, uint32_t from, const Runs& runs) const {
    for_each_share<kBytes, true>(runs, to, [&](const CopyShare& share) {
      char* target = to + share.global;
      uint32_t at = from + share.begin;
      repeat(share.count, [&] {
        if constexpr (kBytes == kLeastUnitBytes) {
          for_each<0, kSectorsInARow>([&](auto index) {
            constexpr int kOffset = decltype(index)::value * kSectorBytes;
            if (share.has[decltype(index)::value]) {
              *reinterpret_cast<uint16_t*>(target + kOffset) = load_element<kOffset>(at);
            }
          });
        } else {
          store_unit<kBytes>(target, at);
        }
        target += share.global_step;
        at += share.step;
      });
    });
  }
};

}  // namespace shufflenet::cuda
