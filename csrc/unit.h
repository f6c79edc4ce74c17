// One ShuffleNet unit, v1 or v2: its sizes, and the pointers that a kernel works on. Nothing here knows torch.
#pragma once

#include <cstdint>
#include <limits>

namespace shufflenet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// tfloat32 is float32 whose pointwise products may be rounded to TF32: a kernel of its own on CUDA, none on the CPU.
enum class Dtype { float32, float64, bfloat16, float16, tfloat32 };
inline constexpr int kDtypes = 5;
enum class Layout { contiguous, channels_last };

// What becomes of a value, by its bounds: one that lies below `lower` becomes `lower`.
struct Activation {
  double lower = -std::numeric_limits<double>::infinity();
};
inline constexpr Activation kNoActivation, kRelu = {0};

enum class Version { v1, v2 };

// Sizes as checked by arguments.h; kernels trust them.
//
// A unit of v2 has the same three convolutions, none of them grouped and with no shuffle between them. With stride 1
// conv1 reads the second half of x's channels, and the first half passes by; with stride 2 it reads all, and so does
// the shortcut, a depthwise convolution and a pointwise one. What passes by, or the shortcut's result, is joined with
// conv3's, which comes behind it, and the channels of both are shuffled.
struct Unit {
  Version version = Version::v1;
  int64_t batch = 0;
  int64_t in_channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t mid_channels = 0;
  int64_t out_channels = 0;  // of conv3; 0 where the unit ends after the depthwise convolution
  int64_t conv1_groups = 1;
  int64_t groups = 1;          // of conv3
  int64_t shuffle_groups = 1;  // so many channels lie between what consecutive rows of conv1 become
  int64_t stride = 1;
  bool conv2_relu = false;
  bool pool_count_include_pad = true;
  bool shortcut_first = false;  // the pooled shortcut comes first in the concatenation
  bool shortcut_relu = true;    // the ReLU behind the concatenation is for the pooled shortcut as well
  // In v2, groups of the shuffle in whose order x's channels are split in halves, and of that of the joined ones.
  int64_t split_groups = 1, join_groups = 1;
  int64_t shortcut_channels = 0;  // of v2 with stride 2: of the shortcut's pointwise convolution
  Layout layout = Layout::contiguous;

  bool has_conv3() const { return out_channels != 0; }
  bool is_v2() const { return version == Version::v2; }
  bool adds_residual() const { return has_conv3() && stride == 1 && !is_v2(); }
  bool concatenates_pool() const { return has_conv3() && stride == 2 && !is_v2(); }
  bool passes_half() const { return is_v2() && stride == 1; }
  bool convolves_shortcut() const { return is_v2() && stride == 2; }

  // Behind conv1, the depthwise convolution and conv3 (the residual added), and of the pooled shortcut.
  Activation conv1_activation() const { return kRelu; }
  Activation conv2_activation() const { return conv2_relu ? kRelu : kNoActivation; }
  Activation conv3_activation() const { return kRelu; }
  Activation pool_activation() const { return shortcut_relu ? kRelu : kNoActivation; }

  // Where conv3's channels begin in the result, and where those of the pooled shortcut do.
  int64_t first_conv3_channel() const { return concatenates_pool() && shortcut_first ? in_channels : 0; }
  int64_t first_pooled_channel() const { return shortcut_first ? 0 : out_channels; }

  // A 3x3 window with padding 1.
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }

  // Channels of the tensor that the unit writes.
  int64_t result_channels() const {
    if (!has_conv3()) return mid_channels;
    if (is_v2()) return out_channels + (passes_half() ? in_channels / 2 : shortcut_channels);
    return out_channels + (concatenates_pool() ? in_channels : 0);
  }

  // Slice h of the unit is group h of conv3 and the intermediate channels that it reads: no other slice reads those.
  int64_t slice_channels() const { return mid_channels / groups; }
  // Consecutive rows of conv1, which the shuffle puts shuffle_groups channels apart.
  int64_t shuffle_rows() const { return mid_channels / shuffle_groups; }
  // The channels that conv1 reads, the first of which is conv1_first.
  int64_t conv1_channels() const { return passes_half() ? in_channels / 2 : in_channels; }
  int64_t conv1_first() const { return in_channels - conv1_channels(); }
  int64_t conv1_depth() const { return conv1_channels() / conv1_groups; }
  int64_t conv1_group_rows() const { return mid_channels / conv1_groups; }

  // What one image takes.
  int64_t multiply_adds() const {
    return mid_channels * (height * width * conv1_depth() + out_height() * out_width() * 9) +
           out_channels * out_height() * out_width() * slice_channels() +
           out_height() * out_width() * shortcut_weights();
  }
  int64_t weights_and_biases() const {
    return mid_channels * (conv1_depth() + 1 + 9 + 1) + out_channels * (slice_channels() + 1) + shortcut_weights() +
           (convolves_shortcut() ? in_channels + shortcut_channels : 0);
  }
  // Those of the shortcut's two convolutions, without biases.
  int64_t shortcut_weights() const { return convolves_shortcut() ? in_channels * (9 + shortcut_channels) : 0; }
};

// y = scale * (weight (*) x) + bias, for each output channel. The arrays hold the kernel's accumulator type.
struct Convolution {
  const void* weight = nullptr;
  const void* scale = nullptr;  // null: 1
  const void* bias = nullptr;
};

struct UnitPointers {
  const void* x = nullptr;
  Convolution conv1, conv2, conv3;
  Convolution shortcut1, shortcut2;  // of v2 with stride 2: the depthwise and the pointwise one
  void* result = nullptr;
  // How many elements lie between planes, in the contiguous layout.
  int64_t x_plane = 0, result_plane = 0;
  // The planes of the channels that conv1 reads, and those that rows of conv3 and of shortcut2 are written to: in v2 a
  // channel's place has nothing to do with its number. Null: in their order.
  const int64_t* x_planes = nullptr;
  const int64_t* conv3_planes = nullptr;
  const int64_t* shortcut_planes = nullptr;
};

}  // namespace shufflenet
