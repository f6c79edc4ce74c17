// The ops on the CPU: tensors in, steps on raw pointers out, split over torch's threads.
#include "../ops.h"

#include <atomic>
#include <chrono>

#include "describe.h"
#include "network.h"

namespace shufflenet::cpu {

template <class A>
inline constexpr Dtype kAccumulator = std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32;

static Batch batch_of(const Tensor& x, const Images& images, void* result) {
  const int64_t bytes = x.numel() / x.size(0) * static_cast<int64_t>(x.element_size());
  return {images, static_cast<const char*>(x.const_data_ptr()), bytes, static_cast<char*>(result)};
}

template <class A>
static void run_unit(const UnitArguments& arguments, Unit unit, const Tensor& x, const Tensor& result) {
  unit.batch = 1;
  const UnitData<A> data(arguments);
  UnitPointers pointers;
  pointers.conv1 = data.conv1.pointers;
  pointers.conv2 = data.conv2.pointers;
  if (data.conv3) pointers.conv3 = data.conv3->pointers;
  pointers.x_plane = unit.height * unit.width;
  pointers.result_plane = unit.out_height() * unit.out_width();
  const int64_t threads = torch::stable::get_num_threads();
  const Images images = images_of(x.size(0), threads);
  CallMemory memory;
  const Steps steps = {memory.make<UnitStep<A>>(unit, pointers, isa().unit_kernel(dtype_of("x", x)), threads, images)};
  Phases phases(memory);
  add_phases(steps, batch_of(x, images, result.mutable_data_ptr()), phases);
  run_phases(phases);
}

static Tensor run(const UnitArguments& arguments) {
  const Unit unit = check_unit(arguments);
  const Tensor x = dense(arguments.x, unit.layout);
  const Tensor result = empty_result(x, unit);
  if (unit.batch == 0) return result;
  if (dtype_of("x", x) == Dtype::float64) {
    run_unit<double>(arguments, unit, x, result);
  } else {
    run_unit<float>(arguments, unit, x, result);
  }
  return result;
}

// What the steps of a program are made of, beside the program.
struct Setup {
  CallMemory& memory;
  Dtype dtype;  // of x
  int64_t threads;
  Images images;
};

// The steps that are done to each image; the head's linear layer takes all images at once.
template <class A>
static Steps steps_of(const Program& program, const PackedData<A>& data, const Setup& setup) {
  const auto [memory, dtype, threads, images] = setup;
  // Between a stem and a head all is contiguous and of the accumulator type; units alone are of x's.
  const UnitKernel unit_kernel = isa().unit_kernel(program.stem ? kAccumulator<A> : dtype);
  Steps steps;
  steps.reserve(program.units.size() + 2);
  int64_t plane = program.units.front().unit.height * program.units.front().unit.width;
  if (program.stem) {
    plane = ImageLayout::padded(plane);
    steps.push_back(memory.template make<StemStep>(
        program.stem->stem, data[program.stem->conv], plane, isa().network_kernel(dtype).stem, threads));
  }
  for (size_t i = 0; i < program.units.size(); ++i) {
    const PackedUnit& packed = program.units[i];
    const int64_t pixels = packed.unit.out_height() * packed.unit.out_width();
    const bool is_result = i + 1 == program.units.size() && !program.head;
    UnitPointers pointers;
    pointers.conv1 = data[packed.conv1];
    pointers.conv2 = data[packed.conv2];
    pointers.conv3 = data[packed.conv3];
    pointers.x_plane = plane;
    pointers.result_plane = plane = is_result ? pixels : ImageLayout::padded(pixels);
    steps.push_back(memory.template make<UnitStep<A>>(packed.unit, pointers, unit_kernel, threads, images));
  }
  if (program.head) {
    const Head& head = program.head->head;
    const auto means = isa().network_kernel(dtype).window_means;
    const int64_t bytes = head.channels * static_cast<int64_t>(sizeof(A));
    steps.push_back(channels_step(
        memory, {ChannelsWork::Kind::means, head.channels, head.height, head.width, bytes}, threads,
        [=](const void* from, void* to, Channels channels) { means(head, from, plane, channels, to); }));
  }
  return steps;
}

static int64_t linear_tasks(const Head& head, int64_t threads) { return std::min(head.classes, 4 * threads); }

template <class Run>
static void add_linear_phase(const Head& head, int64_t threads, size_t step, Phases& phases, const Run& run) {
  const int64_t tasks = linear_tasks(head, threads);
  phases.add(static_cast<int64_t>(step), tasks, [classes = head.classes, tasks, run](int64_t i) {
    run(Channels{classes * i / tasks, classes * (i + 1) / tasks});
  });
}

template <class A>
static void run_steps(const Program& program, const PackedData<A>& data, const Tensor& x, const Tensor& result) {
  CallMemory memory;
  const Dtype dtype = dtype_of("x", x);
  const int64_t threads = torch::stable::get_num_threads(), n = x.size(0);
  const Images images = images_of(n, threads);
  const Steps steps = steps_of(program, data, {memory, dtype, threads, images});
  std::unique_ptr<A[]> means;
  Phases phases(memory);
  if (!program.head) {
    add_phases(steps, batch_of(x, images, result.mutable_data_ptr()), phases);
  } else {
    const Head& head = program.head->head;
    means.reset(new A[n * head.channels]);
    add_phases(steps, batch_of(x, images, means.get()), phases);
    const auto run = [=, means = means.get(), layer = data[program.head->linear],
                      linear = isa().network_kernel(dtype).linear, to = result.mutable_data_ptr()](Channels classes) {
      linear(head, layer, means, n, classes, to);
    };
    add_linear_phase(head, threads, steps.size(), phases, run);
  }
  run_phases(phases);
}

// Otherwise a program in bfloat16 is computed in float, from weights that each call widens.
static bool runs_pairs(const Program& program, Dtype weights) {
  const auto& units = program.units;
  return isa().pair_kernel && weights == Dtype::bfloat16 &&
         std::all_of(units.begin(), units.end(), [](const PackedUnit& packed) { return has_pairs(packed.unit); });
}

// As steps_of, on planes of pairs. An image's means are one element of each plane of so many.
static Steps pair_steps_of(const Program& program, PairData& data, int64_t means_plane, const Setup& setup) {
  const auto [memory, dtype, threads, images] = setup;
  const PairKernel kernel = isa().pair_kernel(dtype);
  const UnitKernel& unit_kernel = kernel.unit;
  Steps steps;
  steps.reserve(program.units.size() + 2);
  const Unit& first = program.units.front().unit;
  int64_t plane = ImageLayout::padded(first.height * first.width);
  if (program.stem) {
    const Stem& stem = program.stem->stem;
    const Convolution conv = data.stem_pairs(program.stem->conv, stem);
    steps.push_back(memory.make<StemStep>(stem, conv, plane, kernel.stem, threads));
  } else {
    const TensorImage image = {program.layout, first.in_channels, first.height * first.width};
    const int64_t bytes = first.in_channels / 2 * plane * unit_kernel.element_bytes;
    steps.push_back(channels_step(
        memory, {ChannelsWork::Kind::conversion, first.in_channels, first.height, first.width, bytes}, threads,
        [=](const void* from, void* to, Channels channels) {
          kernel.read_image(
              image, from, channels, to, plane, thread_scratch.reserve(kernel.image_scratch_bytes(image)));
        }));
  }
  for (const PackedUnit& packed : program.units) {
    Unit unit = packed.unit;
    unit.layout = Layout::contiguous;
    UnitPointers pointers;
    pointers.conv1 = data.pairs(packed.conv1, unit.mid_channels, unit.conv1_depth());
    pointers.conv2 = data.floats(packed.conv2, unit.mid_channels, 9);
    pointers.conv3 = data.pairs(packed.conv3, unit.out_channels, unit.slice_channels());
    pointers.x_plane = plane;
    pointers.result_plane = plane = ImageLayout::padded(unit.out_height() * unit.out_width());
    steps.push_back(memory.make<UnitStep<float>>(unit, pointers, unit_kernel, threads, images));
  }
  if (program.head) {
    const Head& head = program.head->head;
    steps.push_back(channels_step(
        memory, {ChannelsWork::Kind::means, head.channels, head.height, head.width, unit_kernel.element_bytes}, threads,
        [=](const void* from, void* to, Channels channels) {
          kernel.window_means(head, from, plane, channels, to, means_plane);
        }));
  } else {
    const auto [n, channels, height, width] = program.sizes;
    (void)n;
    const TensorImage image = {program.layout, channels, height * width};
    const int64_t bytes = channels * image.pixels * isa().unit_kernel(dtype).element_bytes;
    steps.push_back(channels_step(
        memory, {ChannelsWork::Kind::conversion, channels, height, width, bytes}, threads,
        [=](const void* from, void* to, Channels c) {
          kernel.write_image(image, from, plane, c, to, thread_scratch.reserve(kernel.image_scratch_bytes(image)));
        }));
  }
  return steps;
}

static void run_pairs(const Program& program, const Tensor& weights, const Tensor& x, const Tensor& result) {
  CallMemory memory;
  const Dtype dtype = dtype_of("x", x);
  const int64_t threads = torch::stable::get_num_threads(), n = x.size(0);
  const Images images = images_of(n, threads);
  const int64_t means_plane = ImageLayout::padded(n);
  PairData data(weights, memory);
  const Steps steps = pair_steps_of(program, data, means_plane, {memory, dtype, threads, images});
  std::unique_ptr<float[]> means;
  Phases phases(memory);
  if (!program.head) {
    add_phases(steps, batch_of(x, images, result.mutable_data_ptr()), phases);
  } else {
    const Head& head = program.head->head;
    // Zeros: the images of a plane's padding are computed with, and not used.
    means.reset(new float[head.channels / 2 * means_plane]());
    add_phases(steps, batch_of(x, images, means.get()), phases);
    const auto run = [=, means = means.get(), layer = data.pairs(program.head->linear, head.classes, head.channels),
                      linear = isa().pair_kernel(dtype).linear, to = result.mutable_data_ptr()](Channels classes) {
      linear(head, layer, means, means_plane, n, classes, to);
    };
    add_linear_phase(head, threads, steps.size(), phases, run);
  }
  run_phases(phases);
}

static void check_ends(const Program& program) {
  if (program.stem.has_value() != program.head.has_value()) {
    fail("program: got a ", program.stem ? "stem" : "head", " alone, expected a stem and a head or neither");
  }
}

Description describe(const Program& program, Dtype dtype, Dtype weights_dtype, int64_t images, int64_t threads) {
  check_ends(program);
  Description description;
  const Images count = images_of(images, threads);
  description.images_alone = count.alone;
  description.images_shared = count.shared;
  CallMemory memory;
  PairData pairs(memory);
  const Setup setup = {memory, dtype, threads, {1, 1}};  // so that both ways are there
  const Steps steps = runs_pairs(program, weights_dtype) ? pair_steps_of(program, pairs, 0, setup)
                      : dtype == Dtype::float64          ? steps_of(program, PackedData<double>(), setup)
                                                         : steps_of(program, PackedData<float>(), setup);
  for (const Step* step : steps) description.steps.push_back(step->describe());
  if (program.head) {
    const Head& head = program.head->head;
    StepDescription linear;
    linear.input = {head.channels};
    linear.output = {head.classes};
    linear.multiply_adds = head.channels * head.classes;
    linear.weights_and_biases = (head.channels + 1) * head.classes;
    linear.alone.cut = linear.shared.cut = cut_into(linear_tasks(head, threads), "class shares");
    description.steps.push_back(linear);
  }
  return description;
}

double measure_peak(Dtype dtype) {
  using Clock = std::chrono::steady_clock;
  const NetworkKernel kernel = isa().network_kernel(dtype);
  constexpr int64_t kRounds = 100'000;  // about half a millisecond: so short that some of the times are undisturbed
  constexpr int kTimes = 60;
  double peak = 0;
  for (int i = 0; i < kTimes; ++i) {
    std::atomic<int64_t> multiply_adds{0};
    const auto start = Clock::now();
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) multiply_adds += kernel.multiply_add(kRounds);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    peak = std::max(peak, 2 * static_cast<double>(multiply_adds) / seconds);
  }
  return peak;
}

static Tensor run_program(const Tensor& given_x, const Tensor& weights, const Program& program, bool) {
  check_ends(program);
  const Tensor x = dense(given_x, program.layout);
  const Tensor result =
      program.head ? empty_like_x<2>(x, {x.size(0), program.head->head.classes}, {program.head->head.classes, 1})
                   : empty_like_x(x, program.sizes, program.layout);
  if (x.size(0) == 0) return result;
  if (runs_pairs(program, dtype_of("weights", weights))) {
    run_pairs(program, weights, x, result);
  } else if (dtype_of("x", x) == Dtype::float64) {
    run_steps<double>(program, PackedData<double>(weights), x, result);
  } else {
    run_steps<float>(program, PackedData<float>(weights), x, result);
  }
  return result;
}

}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) {
  shufflenet::Ops<shufflenet::cpu::run, shufflenet::cpu::run_program>::implement(m);
}
