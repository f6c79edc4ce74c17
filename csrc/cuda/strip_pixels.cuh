// A strip of x in channels_last: a pixel's channels lie side by side in shared memory too, and results go to global
// memory from registers, in accesses of 8 bytes, which fill its sectors.
#pragma once

#include "strip_pool.cuh"
#include "strip_products.cuh"
#include "strip_staging.cuh"

namespace shufflenet::cuda {

template <class T>
struct StripPixels : StripStaging {
  SHUFFLENET_DEVICE explicit StripPixels(const StripArguments& arguments) : StripStaging(arguments) {}

  static constexpr bool kTransposed = false;
  static constexpr int kElement = sizeof(T);

  // Starts to copy the strip's rows of x. A lane copies a block of four neighbouring pixels at a time, and as many
  // lanes as a pixel has blocks all of these pixels.
  SHUFFLENET_DEVICE void copy_x() const {
    const int lanes = constants.copy_lanes, mine = constants.by_copy_lanes.quotient(lane);
    if (mine * 4 == constants.copy_pixels) return;  // a lane that is left over
    const int pixels = image_rows * s.width, first = warp * constants.copy_pixels + mine * 4;
    const int step = t.warps * constants.copy_pixels;
    const uint32_t pixel_bytes = s.in_channels * kElement;
    const int x_pitch = layout.x_pitch;
    const char* const strip = x_of_image() + (image_row * s.width + first) * pixel_bytes;
    SHUFFLENET_NO_UNROLL
    for (int block = lane - mine * lanes; block < layout.own_blocks; block += 32) {
      const char* from = strip + block * kBlockBytes;
      uint32_t to = base + layout.x_offset(first, block * kBlockBytes);
      int left = pixels - first;
      SHUFFLENET_NO_UNROLL
      for (; left >= 4; left -= step) {
        copy_block_async(to, from);
        copy_block_async(to + x_pitch, from + pixel_bytes);
        copy_block_async(to + 2 * x_pitch, from + 2 * pixel_bytes);
        copy_block_async(to + 3 * x_pitch, from + 3 * pixel_bytes);
        from += constants.copy_bytes;
        to += constants.copy_pitch;
      }
      SHUFFLENET_NO_UNROLL
      for (int i = 0; i < left; ++i) copy_block_async(to + i * x_pitch, from + i * pixel_bytes);
    }
    commit_copies();
  }

  // Zeroes the blocks of x that conv1 or the pool loads without using them, and the pixel of zeros behind the last one,
  // as one thread of several.
  SHUFFLENET_DEVICE void clear_unused_x(int thread, int threads) const {
    const int blocks = layout.own_blocks, unused = layout.x_blocks - blocks;
    if (unused == 0 && s.stride == 1) return;
    const int pixels = image_rows * s.width, pitch_blocks = layout.x_pitch / kBlockBytes;
    if (unused > 0) {
      const int in_pitch = least(unused, pitch_blocks - blocks), behind_last = s.stride == 2 ? in_pitch : unused;
      SHUFFLENET_NO_UNROLL
      for (int pixel = thread; pixel < pixels; pixel += threads) {
        const int count = pixel == pixels - 1 ? behind_last : in_pitch;
        SHUFFLENET_NO_UNROLL
        for (int i = 0; i < count; ++i) clear_block(base + layout.x_offset(pixel, (blocks + i) * kBlockBytes));
      }
    }
    if (s.stride == 2) {
      SHUFFLENET_NO_UNROLL
      for (int block = thread; block < pitch_blocks; block += threads) {
        clear_block(base + pixels * layout.x_pitch + block * kBlockBytes);
      }
    }
  }

  // Returns the address that the lane passes to load the channels of a block of x, and of the next one, of 16 pixels
  // from `pixel` on. Behind the last pixel it is that of the last one.
  SHUFFLENET_DEVICE uint32_t operand_row(int pixel, int block, int last) const {
    return base + layout.x_offset(least(pixel + lane % 16, last), (block + lane / 16) * kBlockBytes);
  }
  SHUFFLENET_DEVICE uint32_t bytes_to_next_pixel() const { return layout.x_pitch; }
  SHUFFLENET_DEVICE PixelOperand<T, kHalfBytes> operand(const uint32_t (&row)[kTilesOfItem], int) const {
    return {{row[0], row[1]}};
  }

  // Returns the pixel of the result that conv3's items begin at.
  SHUFFLENET_DEVICE int first_item() const { return 0; }
  // Which of a tile's constants of conv3 the lane takes.
  SHUFFLENET_DEVICE int affine3_lane() const { return lane % 4; }
  // Returns a sum that is NaN if any channel of y2 is, in any pixel of the lane.
  template <int kTiles>
  SHUFFLENET_DEVICE static float any_sum(const Sums<kTiles>& sums) {
    return sums[0][0][0] + sums[0][0][2] + (sums[1][0][0] + sums[1][0][2]);
  }

  // Where the results of 32 pixels of a slice go, kPairs pairs of tiles at a time.
  template <int kPairs>
  struct Results {
    SHUFFLENET_DEVICE Results(const StripPixels& strip, int first_pixel, int slice)
        : pixel_bytes(strip.s.result_channels * kElement), x_pitch(strip.layout.x_pitch) {
      const Sizes& s = strip.s;
      const int pixel = first_pixel + strip.lane / 4;
      // The lane's four channels of a pair of tiles, within the slice's group, and their byte in a pixel.
      const int group = strip.part * strip.t.slices + slice;
      channel = strip.lane % 4 * 4 - strip.packed.channels_left_out(s, group);
      const int byte = (group * s.group_rows + channel) * kElement;
      from = strip.base + strip.layout.x_offset(pixel + strip.rows_above_result() * s.width, byte);
      const uint32_t in_image = (strip.out_row * s.out_width + pixel) * pixel_bytes;
      to = strip.result_of_image() + in_image + (s.first_conv3_channel * kElement + byte);
      pixels_left = strip.out_rows * s.out_width - first_pixel;
      channels = s.group_rows;
      adds_residual = s.stride == 1;
      has_whole_chunks = strip.packed.has_whole_chunks;
      shares_fours = strip.constants.shares_fours;
    }

    // Goes on to later pixels: a multiple of 8, so that the swizzle is the same.
    SHUFFLENET_DEVICE void advance(int pixels) {
      from += pixels * x_pitch;
      to += pixels * pixel_bytes;
      pixels_left -= pixels;
    }

    // Writes a chunk of the channels, and goes on to the next one.
    SHUFFLENET_DEVICE void write(const Sums<2 * kPairs>& sums, const Fragment* affine) {
      if (adds_residual) {
        write_as<true>(sums, affine);
      } else {
        write_as<false>(sums, affine);
      }
      channel += kPairs * 2 * kColumns;
      from += kPairs * 2 * kColumns * kElement;
      to += kPairs * 2 * kColumns * kElement;
    }

   private:
    // Which of an item's pixels, and of a pair's channels, are written.
    enum class Places {
      all,
      some,   // those that are there: a lane has four channels, or none
      parts,  // of a lane's four channels some may be another slice's
    };

    template <bool kResidual>
    SHUFFLENET_DEVICE void write_as(const Sums<2 * kPairs>& sums, const Fragment* affine) const {
      if (shares_fours) {
        write_places<kResidual, Places::parts>(sums, affine);
      } else if (kResidual && has_whole_chunks && pixels_left >= kItemPixels) {
        write_places<kResidual, Places::all>(sums, affine);
      } else {
        write_places<kResidual, Places::some>(sums, affine);
      }
    }

    // Finishes and writes the sums, behind adding x's pixels if kResidual.
    template <bool kResidual, Places kPlaces>
    SHUFFLENET_DEVICE void write_places(const Sums<2 * kPairs>& sums, const Fragment* affine) const {
      char* out[2 * kTilesOfItem];
      uint32_t x[2 * kTilesOfItem];  // the swizzle is the same every eight pixels
      SHUFFLENET_UNROLL
      for (int eight = 0; eight < 2 * kTilesOfItem; ++eight) {
        out[eight] = eight == 0 ? to : out[eight - 1] + 8 * pixel_bytes;
        x[eight] = eight == 0 ? from : x[eight - 1] + 8 * x_pitch;
      }
      const int lanes_left = pixels_left - lane_index() / 4;  // from the lane's first pixel on
      for_each<0, kPairs>([&](auto index) {
        constexpr int kPair = decltype(index)::value, kChannels = kPair * 2 * kColumns;
        constexpr int kBytes = kChannels * kElement;
        const int four = channel + kChannels;
        if (kPlaces != Places::all && (four <= -4 || four >= channels)) return;
        const Vector4 first = load_floats<kPair * 8>(affine), second = load_floats<kPair * 8 + 4>(affine);
        SHUFFLENET_UNROLL
        for (int m = 0; m < kTilesOfItem; ++m) {
          Pair<T> low[2], high[2];
          finish<T, !kResidual>(sums[m][2 * kPair], first, low);
          finish<T, !kResidual>(sums[m][2 * kPair + 1], second, high);
          SHUFFLENET_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int eight = 2 * m + half;
            if (kPlaces != Places::all && lanes_left <= eight * 8) continue;
            if constexpr (kResidual) add_relu_to<kBytes>(x[eight], low[half], high[half], T{});
            if (kPlaces != Places::parts || (four >= 0 && four + 4 <= channels)) {
              store_pairs<kBytes>(out[eight], low[half], high[half]);
            } else {
              store_some(out[eight] + kBytes, low[half], high[half], four);
            }
          }
        }
      });
    }

    // Writes those of four channels, from `first` on, that are the group's.
    SHUFFLENET_DEVICE void store_some(char* out, uint32_t low, uint32_t high, int first) const {
      uint64_t four = low | uint64_t{high} << 32;
      SHUFFLENET_NO_UNROLL
      for (int i = 0; i < 4; ++i, four >>= 16, out += kElement) {
        if (first + i >= 0 && first + i < channels) store_one(out, static_cast<uint16_t>(four));
      }
    }
    SHUFFLENET_DEVICE void store_some(char* out, FloatPair low, FloatPair high, int first) const {
      SHUFFLENET_NO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const FloatPair pair = i < 2 ? low : high;
        if (first + i >= 0 && first + i < channels) store_one(out + i * kElement, i % 2 == 0 ? pair.low : pair.high);
      }
    }

    char* to;
    uint32_t from;  // the residual
    uint32_t pixel_bytes;
    int x_pitch;
    int pixels_left;        // from the item's first one on
    int channel, channels;  // the lane's first one in the group, which has so many
    bool adds_residual, has_whole_chunks, shares_fours;
  };

  SHUFFLENET_DEVICE void before_results() const {}
  SHUFFLENET_DEVICE void after_results() const {
    if (s.stride == 2) StripPool<T>(*this).run();
  }
};

}  // namespace shufflenet::cuda
