#include "plan.h"

#include "channel_planes.h"
#include "convolution_step.h"
#include "head_step.h"
#include "unit_step.h"

namespace shufflenet::cpu {
namespace {

Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

bool is_in_pairs(const Kernels& kernels) { return kernels.unit().channels_per_element() > 1; }

// The kernels for a program: on planes of pairs where they can run it. Otherwise a program in bfloat16 is computed in
// float, from weights that each call widens.
const Kernels& kernels_for(const Program& program, Dtype dtype, Dtype weights) {
  const auto fits = [](const PackedUnit& packed) { return has_pairs(packed.unit); };
  const bool all_fit = std::all_of(program.units.begin(), program.units.end(), fits) &&
                       (!program.stem || program.stem->stem.out_channels % 2 == 0) && program.sizes[1] % 2 == 0 &&
                       (!program.last || program.last->layer.in_channels % 2 == 0);
  const Kernels* const pairs = weights == Dtype::bfloat16 && all_fit ? isa().pair_kernels(dtype) : nullptr;
  return pairs ? *pairs : isa().kernels(dtype);
}

// The convolutions of a program's steps, in their order, in the call's memory.
const Convolution* convolutions_of(const Program& program, ProgramWeights weights, CallMemory& memory) {
  Convolution* const first = memory.array<Convolution>(program.convolutions());
  Convolution* next = first;
  if (program.stem) *next++ = weights.stem(program.stem->conv, program.stem->stem);
  for (const auto& [unit, conv1, conv2, conv3, shortcut1, shortcut2] : program.units) {
    *next++ = weights.pointwise(conv1, unit.mid_channels, unit.conv1_depth());
    *next++ = weights.depthwise(conv2, unit.mid_channels);
    *next++ = weights.pointwise(conv3, unit.out_channels, unit.slice_channels());
    if (unit.convolves_shortcut()) {
      *next++ = weights.depthwise(shortcut1, unit.in_channels);
      *next++ = weights.pointwise(shortcut2, unit.shortcut_channels, unit.in_channels);
    }
  }
  if (program.last) {
    *next++ = weights.pointwise(program.last->conv, program.last->layer.out_channels, program.last->layer.in_channels);
  }
  if (program.head) {
    *next++ = weights.pointwise(program.head->linear, program.head->head.classes, program.head->head.channels);
  }
  return first;
}

struct Steps {
  ImageSteps images;
  const LinearStep* linear = nullptr;  // behind them, where there is a head
};

// Makes a program's steps, in the call's memory. They work on planes of the kernels' format, to which tensors are
// converted, and back, unless they are such planes already. Channels of v2 are in any of them: x is copied ahead of a
// unit that leaves half of it where it is, and a result is written in order by the conversion. A unit that copies its
// parts has no conversions around it: it works on the tensors as they are. `sharing` says which ways of running a step
// are wanted.
Steps steps_of(const Program& program, const Kernels& kernels, const Convolution* conv, const Call& call,
               int64_t threads, const Images& sharing, CallMemory& memory) {
  const Dtype dtype = call.dtype, accumulator = accumulator_of(dtype);
  const bool in_pairs = is_in_pairs(kernels);
  const bool on_tensors = program.copies_parts;
  const UnitKernel& unit_kernel = in_pairs || on_tensors ? kernels.unit() : isa().kernels(accumulator).unit();
  const bool converts = !on_tensors && (in_pairs || dtype != accumulator || program.layout != Layout::contiguous);
  const bool is_named = program.is_v2() && !in_pairs;  // whether channels are in any planes
  const bool converts_x = converts || (is_named && program.units[0].unit.passes_half());
  const bool converts_result = converts || (is_named && !program.last);
  Steps steps;
  steps.images.reserve(program.units.size() + 4);
  const auto add_channels_step = [&](const ChannelsWork& work, const auto& run) {
    steps.images.push_back(memory.make<ChannelsStep<std::decay_t<decltype(run)>>>(work, threads, run));
  };
  // Elements from plane to plane of what a step writes: the last one may write a tensor.
  const auto plane_of = [&](int64_t pixels, bool is_last) {
    return is_last && !program.head && !converts_result ? pixels : padded_plane(pixels);
  };

  int64_t plane = program.x[2] * program.x[3];  // of what the next step reads
  if (program.stem) {
    const Stem& stem = program.stem->stem;
    plane = plane_of(stem.out_height() * stem.out_width(), program.units.empty() && !program.last);
    steps.images.push_back(
        memory.make<ConvolutionStep<Stem>>(stem, *conv++, plane, kernels.stem(), unit_kernel, threads));
  } else if (converts_x) {
    const auto [n, channels, height, width] = program.x;
    (void)n;
    const TensorImage image = {program.layout, channels, height * width};
    plane = padded_plane(image.pixels);
    add_channels_step(
        {"conversion", channels, height, width, true, unit_kernel.image_bytes(channels, plane)},
        [=, &kernel = kernels.image()](const void* from, void* to, Range some) {
          kernel.read(image, from, some, to, plane, thread_workspace.reserve(kernel.workspace_bytes(image)));
        });
  }
  ChannelPlanes channels_at(is_named ? program.units[0].unit.in_channels : 0, memory);
  for (const PackedUnit& packed : program.units) {
    Unit unit = packed.unit;
    if (!on_tensors) unit.layout = Layout::contiguous;
    UnitPointers pointers;
    if (is_named) channels_at.go_through(unit, pointers);
    pointers.conv1 = *conv++;
    pointers.conv2 = *conv++;
    if (unit.has_conv3()) pointers.conv3 = *conv++;
    if (unit.convolves_shortcut()) {
      pointers.shortcut1 = *conv++;
      pointers.shortcut2 = *conv++;
    }
    const bool is_last = &packed == &program.units.back() && !program.last;
    pointers.x_plane = plane;
    pointers.result_plane = plane = plane_of(unit.out_height() * unit.out_width(), is_last);
    steps.images.push_back(memory.make<UnitStep>(unit, pointers, unit_kernel, threads, sharing));
  }
  const int64_t* planes = is_named ? channels_at.planes() : nullptr;  // of what the next step reads
  if (program.last) {
    LastConvolution layer = program.last->layer;
    layer.x_plane = std::exchange(plane, plane_of(layer.pixels(), true));
    layer.x_planes = std::exchange(planes, nullptr);
    steps.images.push_back(memory.make<ConvolutionStep<LastConvolution>>(
        layer, *conv++, plane, kernels.last_convolution(), unit_kernel, threads));
  }
  if (program.head) {
    Head head = program.head->head;
    head.x_plane = plane;
    head.x_planes = planes;
    const HeadKernel& kernel = kernels.head();
    add_channels_step({"", head.channels, head.height, head.width, false, kernel.means_step(head)},
                      [=, &kernel, images = call.images](const void* from, void* to, Range channels) {
                        kernel.means(head, images, from, channels, to);
                      });
    steps.linear = memory.make<LinearStep>(head, call.images, *conv++, kernel, threads);
  } else if (converts_result) {
    const auto [n, channels, height, width] = program.sizes;
    (void)n;
    const TensorImage image = {program.layout, channels, height * width};
    add_channels_step(
        {"conversion", channels, height, width, true, channels * height * width * element_bytes(dtype)},
        [=, &kernel = kernels.image()](const void* from, void* to, Range some) {
          kernel.write(image, from, plane, planes, some, to, thread_workspace.reserve(kernel.workspace_bytes(image)));
        });
  }
  return steps;
}

// Runs a program from its convolutions, in their order.
void run_steps(const Program& program, const Kernels& kernels, const Convolution* convolutions, const Call& call,
               CallMemory& memory) {
  const int64_t threads = torch::stable::get_num_threads();
  const Images images = images_of(call.images, threads);
  const Steps steps = steps_of(program, kernels, convolutions, call, threads, images, memory);
  // Zeros: a format may compute with means of images that are none.
  std::unique_ptr<char[]> means;
  if (steps.linear) means.reset(new char[steps.linear->means_bytes()]());
  const int64_t x_bytes = program.x[1] * program.x[2] * program.x[3] * element_bytes(call.dtype);
  Phases phases(memory);
  add_phases(steps.images, {images, call.x, x_bytes, steps.linear ? means.get() : call.result}, phases);
  if (steps.linear) {
    steps.linear->share(static_cast<int64_t>(steps.images.size()), means.get(), call.result, phases);
  }
  run_phases(phases);
}

}  // namespace

void run_program(const Program& program, const PackedWeights& weights, const Call& call) {
  CallMemory memory;
  const Kernels& kernels = kernels_for(program, call.dtype, weights.dtype);
  const ProgramWeights of_format(weights, accumulator_of(call.dtype), is_in_pairs(kernels), memory);
  run_steps(program, kernels, convolutions_of(program, of_format, memory), call, memory);
}

void run_program(const Program& program, const Convolution* convolutions, const Call& call) {
  CallMemory memory;
  run_steps(program, isa().kernels(call.dtype), convolutions, call, memory);
}

Description describe_program(const Program& program, Dtype weights, const Call& call, int64_t threads) {
  CallMemory memory;
  const Images images = images_of(call.images, threads);
  const Kernels& kernels = kernels_for(program, call.dtype, weights);
  const std::vector<Convolution> none(program.convolutions());
  const Images both_ways = {1, 1};
  const Steps steps = steps_of(program, kernels, none.data(), call, threads, both_ways, memory);
  Description description = {images, {}};
  for (const Step* step : steps.images) description.steps.push_back(step->describe());
  if (steps.linear) description.steps.push_back(steps.linear->describe());
  return description;
}

double measure_peak(Dtype dtype) {
  constexpr int64_t kRounds = 100'000;  // about half a millisecond: so short that some of the times are undisturbed
  constexpr int kTimes = 60;
  double peak = 0;
  for (int i = 0; i < kTimes; ++i) {
    std::atomic<int64_t> multiply_adds{0};
    const auto start = Clock::now();
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) multiply_adds += isa().multiply_add(dtype, kRounds);
    });
    const double seconds = seconds_between(start, Clock::now());
    peak = std::max(peak, 2 * static_cast<double>(multiply_adds) / seconds);
  }
  return peak;
}

}  // namespace shufflenet::cpu
