#include "plan.h"

#include "head_step.h"
#include "stem_step.h"
#include "unit_step.h"

namespace shufflenet::cpu {
namespace {

int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::bfloat16:
    case Dtype::float16: return 2;
    default: return 4;
  }
}

Dtype accumulator_of(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

// The kernels for a program: on planes of pairs where they can run it. Otherwise a program in bfloat16 is computed in
// float, from weights that each call widens.
const Kernels& kernels_for(const Program& program, Dtype dtype, Dtype weights) {
  const auto fits = [](const PackedUnit& packed) { return has_pairs(packed.unit); };
  const bool all_fit = std::all_of(program.units.begin(), program.units.end(), fits);
  const Kernels* const pairs = weights == Dtype::bfloat16 && all_fit ? isa().pair_kernels(dtype) : nullptr;
  return pairs ? *pairs : isa().kernels(dtype);
}

// What a program's steps are made for.
struct Setup {
  Dtype dtype;  // of x and the result
  int64_t images, threads;
  Images sharing;  // which ways of running a step are wanted
};

struct Steps {
  ImageSteps images;
  const LinearStep* linear = nullptr;  // behind them, where there is a head
};

// Makes a program's steps, in the call's memory.
Steps steps_of(const Program& program, const Kernels& kernels, const PackedWeights& packed, const Setup& setup,
               CallMemory& memory) {
  const auto& [dtype, images, threads, sharing] = setup;
  const bool in_pairs = kernels.image();  // tensors are converted to the units' planes, and back
  ProgramWeights weights(packed, accumulator_of(dtype), in_pairs, memory);
  // Between a stem and a head all is contiguous and of the accumulator type; units alone are of x's.
  const bool in_floats = program.stem && !in_pairs;
  const UnitKernel& unit_kernel = (in_floats ? isa().kernels(accumulator_of(dtype)) : kernels).unit();
  Steps steps;
  steps.images.reserve(program.units.size() + 2);
  const auto add_channels_step = [&, threads = threads](const ChannelsWork& work, const auto& run) {
    steps.images.push_back(memory.make<ChannelsStep<std::decay_t<decltype(run)>>>(work, threads, run));
  };

  const Unit& first = program.units.front().unit;
  int64_t plane = first.height * first.width;  // elements from plane to plane of what the next step reads
  if (program.stem || in_pairs) plane = padded_plane(plane);
  if (program.stem) {
    const Convolution conv = weights.stem(program.stem->conv, program.stem->stem);
    steps.images.push_back(
        memory.make<StemStep>(program.stem->stem, conv, plane, kernels.stem(), unit_kernel, threads));
  } else if (in_pairs) {
    const TensorImage image = {program.layout, first.in_channels, first.height * first.width};
    const int64_t bytes = first.in_channels / unit_kernel.channels_per_element() * plane * unit_kernel.element_bytes();
    add_channels_step({"conversion", first.in_channels, first.height, first.width, true, bytes},
                      [=, &kernel = *kernels.image()](const void* from, void* to, Range channels) {
                        void* const workspace = thread_workspace.reserve(kernel.workspace_bytes(image));
                        kernel.read(image, from, channels, to, plane, workspace);
                      });
  }
  for (size_t i = 0; i < program.units.size(); ++i) {
    const PackedUnit& given = program.units[i];
    Unit unit = given.unit;
    if (in_pairs) unit.layout = Layout::contiguous;
    const bool is_result = i + 1 == program.units.size() && !program.head && !in_pairs;
    const int64_t pixels = unit.out_height() * unit.out_width();
    UnitPointers pointers;
    pointers.conv1 = weights.pointwise(given.conv1, unit.mid_channels, unit.conv1_depth());
    pointers.conv2 = weights.depthwise(given.conv2, unit.mid_channels);
    pointers.conv3 = weights.pointwise(given.conv3, unit.out_channels, unit.slice_channels());
    pointers.x_plane = plane;
    pointers.result_plane = plane = is_result ? pixels : padded_plane(pixels);
    steps.images.push_back(memory.make<UnitStep>(unit, pointers, unit_kernel, threads, sharing));
  }
  if (program.head) {
    const Head& head = program.head->head;
    const HeadKernel& kernel = kernels.head();
    add_channels_step({"", head.channels, head.height, head.width, false, kernel.means_step(head)},
                      [=, &kernel, images = images](const void* from, void* to, Range channels) {
                        kernel.means(head, images, from, plane, channels, to);
                      });
    const Convolution layer = weights.pointwise(program.head->linear, head.classes, head.channels);
    steps.linear = memory.make<LinearStep>(head, images, layer, kernel, threads);
  } else if (in_pairs) {
    const auto [n, channels, height, width] = program.sizes;
    (void)n;
    const TensorImage image = {program.layout, channels, height * width};
    add_channels_step(
        {"conversion", channels, height, width, true, channels * height * width * element_bytes(dtype)},
        [=, &kernel = *kernels.image()](const void* from, void* to, Range some) {
          kernel.write(image, from, plane, some, to, thread_workspace.reserve(kernel.workspace_bytes(image)));
        });
  }
  return steps;
}

int64_t elements_of_x(const Unit& unit) { return unit.in_channels * unit.height * unit.width; }
int64_t elements_of_x(const Stem& stem) { return stem.in_channels * stem.height * stem.width; }

}  // namespace

void run_unit(const Unit& unit, const UnitPointers& pointers, const Call& call) {
  CallMemory memory;
  const int64_t threads = torch::stable::get_num_threads();
  const Images images = images_of(call.images, threads);
  const ImageSteps steps = {memory.make<UnitStep>(unit, pointers, isa().kernels(call.dtype).unit(), threads, images)};
  Phases phases(memory);
  add_phases(steps, {images, call.x, elements_of_x(unit) * element_bytes(call.dtype), call.result}, phases);
  run_phases(phases);
}

void run_program(const Program& program, const PackedWeights& weights, const Call& call) {
  CallMemory memory;
  const int64_t threads = torch::stable::get_num_threads();
  const Images images = images_of(call.images, threads);
  const Kernels& kernels = kernels_for(program, call.dtype, weights.dtype);
  const Steps steps = steps_of(program, kernels, weights, {call.dtype, call.images, threads, images}, memory);
  // Zeros: a format may compute with means of images that are none.
  std::unique_ptr<char[]> means;
  if (steps.linear) means.reset(new char[steps.linear->means_bytes()]());
  const int64_t elements = program.stem ? elements_of_x(program.stem->stem) : elements_of_x(program.units[0].unit);
  Phases phases(memory);
  add_phases(steps.images,
             {images, call.x, elements * element_bytes(call.dtype), steps.linear ? means.get() : call.result}, phases);
  if (steps.linear) {
    steps.linear->share(static_cast<int64_t>(steps.images.size()), means.get(), call.result, phases);
  }
  run_phases(phases);
}

Description describe_program(const Program& program, Dtype weights, const Call& call, int64_t threads) {
  CallMemory memory;
  const Images images = images_of(call.images, threads);
  const Setup setup = {call.dtype, call.images, threads, {1, 1}};  // so that both ways are there
  const Steps steps = steps_of(program, kernels_for(program, call.dtype, weights), {}, setup, memory);
  Description description;
  description.images_alone = images.alone;
  description.images_shared = images.shared;
  for (const Step* step : steps.images) description.steps.push_back(step->describe());
  if (steps.linear) description.steps.push_back(steps.linear->describe());
  return description;
}

double measure_peak(Dtype dtype) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 100'000;  // about half a millisecond: so short that some of the times are undisturbed
  constexpr int kTimes = 60;
  double peak = 0;
  for (int i = 0; i < kTimes; ++i) {
    std::atomic<int64_t> multiply_adds{0};
    const auto start = Clock::now();
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) multiply_adds += isa().multiply_add(dtype, kRounds);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    peak = std::max(peak, 2 * static_cast<double>(multiply_adds) / seconds);
  }
  return peak;
}

}  // namespace shufflenet::cpu
