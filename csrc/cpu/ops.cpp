// The ops on the CPU: tensors in, steps on raw pointers out, split over torch's threads.
#include "../ops.h"

#include "network.h"

namespace shufflenet::cpu {

template <class A>
inline constexpr Dtype kAccumulator = std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32;

static Batch batch_of(const Tensor& x, void* result) {
  const int64_t bytes = x.numel() / x.size(0) * static_cast<int64_t>(x.element_size());
  return {x.size(0), static_cast<const char*>(x.const_data_ptr()), bytes, static_cast<char*>(result)};
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
  std::vector<std::unique_ptr<Step>> steps;
  steps.push_back(std::make_unique<UnitStep<A>>(
      unit, pointers, isa().unit_kernel(dtype_of("x", x)), torch::stable::get_num_threads()));
  run_phases(phases_of(steps, batch_of(x, result.mutable_data_ptr())));
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

// The head's linear layer, of all images at once.
static Phase linear_phase(const Head& head, size_t step, const std::function<void(Channels)>& run) {
  const int64_t tasks = std::min<int64_t>(head.classes, 4 * torch::stable::get_num_threads());
  return {static_cast<int64_t>(step), tasks,
          [classes = head.classes, tasks, run](int64_t i) { run({classes * i / tasks, classes * (i + 1) / tasks}); }};
}

template <class A>
static void run_steps(const Program& program, const PackedData<A>& data, const Tensor& x, const Tensor& result) {
  const Dtype dtype = dtype_of("x", x);
  // Between a stem and a head all is contiguous and of the accumulator type; units alone are of x's.
  const UnitKernel unit_kernel = isa().unit_kernel(program.stem ? kAccumulator<A> : dtype);
  const int64_t threads = torch::stable::get_num_threads(), images = x.size(0);
  std::vector<std::unique_ptr<Step>> steps;
  int64_t plane = x.size(2) * x.size(3);
  if (program.stem) {
    const Stem& stem = program.stem->stem;
    plane = ImageLayout::padded(stem.out_height() * stem.out_width());
    steps.push_back(std::make_unique<StemStep<A>>(stem, data[program.stem->conv], plane, dtype, threads));
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
    steps.push_back(std::make_unique<UnitStep<A>>(packed.unit, pointers, unit_kernel, threads));
  }
  if (!program.head) {
    run_phases(phases_of(steps, batch_of(x, result.mutable_data_ptr())));
    return;
  }
  const Head& head = program.head->head;
  const Convolution linear = data[program.head->linear];
  const NetworkKernel kernel = isa().network_kernel(dtype);
  steps.push_back(std::make_unique<ChannelsStep>(
      head.channels, head.channels * static_cast<int64_t>(sizeof(A)),
      [=](const void* from, void* to, Channels c) { kernel.window_means(head, from, plane, c, to); }));
  const std::unique_ptr<A[]> means(new A[images * head.channels]);
  std::vector<Phase> phases = phases_of(steps, batch_of(x, means.get()));
  phases.push_back(linear_phase(head, steps.size(), [&](Channels classes) {
    kernel.linear(head, linear, means.get(), images, classes, result.mutable_data_ptr());
  }));
  run_phases(phases);
}

// Otherwise a program in bfloat16 is computed in float, from weights that each call widens.
static bool runs_pairs(const Program& program, const Tensor& weights) {
  const auto& units = program.units;
  return isa().pair_kernel && weights.scalar_type() == ScalarType::BFloat16 &&
         std::all_of(units.begin(), units.end(), [](const PackedUnit& packed) { return has_pairs(packed.unit); });
}

// As run_steps, on planes of pairs.
static void run_pairs(const Program& program, const Tensor& weights, const Tensor& x, const Tensor& result) {
  const Dtype dtype = dtype_of("x", x);
  const PairKernel kernel = isa().pair_kernel(dtype);
  const int64_t threads = torch::stable::get_num_threads(), images = x.size(0);
  PairData data(weights);
  std::vector<std::unique_ptr<Step>> steps;
  int64_t plane;
  if (program.stem) {
    const Stem& stem = program.stem->stem;
    plane = ImageLayout::padded(stem.out_height() * stem.out_width());
    const Convolution conv = data.floats(program.stem->conv, stem.out_channels, stem.taps());
    steps.push_back(std::make_unique<StemStep<float>>(stem, conv, plane, dtype, threads, &kernel));
  } else {
    const TensorImage image = {program.layout, x.size(1), x.size(2) * x.size(3)};
    plane = ImageLayout::padded(image.pixels);
    steps.push_back(std::make_unique<ChannelsStep>(
        image.channels, image.channels / 2 * plane * kernel.unit.element_bytes,
        [=, &kernel](const void* from, void* to, Channels channels) {
          void* const scratch = thread_scratch.reserve(kernel.image_scratch_bytes(image));
          kernel.read_image(image, from, channels, to, plane, scratch);
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
    steps.push_back(std::make_unique<UnitStep<float>>(unit, pointers, kernel.unit, threads));
  }
  if (!program.head) {
    const auto [n, channels, height, width] = program.sizes;
    (void)n;
    const TensorImage image = {program.layout, channels, height * width};
    steps.push_back(std::make_unique<ChannelsStep>(
        channels, channels * image.pixels * static_cast<int64_t>(result.element_size()),
        [=, &kernel](const void* from, void* to, Channels c) {
          void* const scratch = thread_scratch.reserve(kernel.image_scratch_bytes(image));
          kernel.write_image(image, from, plane, c, to, scratch);
        }));
    run_phases(phases_of(steps, batch_of(x, result.mutable_data_ptr())));
    return;
  }
  const Head& head = program.head->head;
  const Convolution linear = data.pairs(program.head->linear, head.classes, head.channels);
  const int64_t means_plane = ImageLayout::padded(images);
  steps.push_back(std::make_unique<ChannelsStep>(
      head.channels, kernel.unit.element_bytes, [=, &kernel](const void* from, void* to, Channels channels) {
        kernel.window_means(head, from, plane, channels, to, means_plane);
      }));
  // The images of a plane's padding are computed with, and not used.
  const std::unique_ptr<float[]> means(new float[head.channels / 2 * means_plane]());
  std::vector<Phase> phases = phases_of(steps, batch_of(x, means.get()));
  phases.push_back(linear_phase(head, steps.size(), [&](Channels classes) {
    kernel.linear(head, linear, means.get(), means_plane, images, classes, result.mutable_data_ptr());
  }));
  run_phases(phases);
}

static Tensor run_program(const Tensor& given_x, const Tensor& weights, const Program& program) {
  if (program.stem.has_value() != program.head.has_value()) {
    fail("program: got a ", program.stem ? "stem" : "head", " alone, expected a stem and a head or neither");
  }
  const Tensor x = dense(given_x, program.layout);
  const Tensor result =
      program.head ? empty_like_x<2>(x, {x.size(0), program.head->head.classes}, {program.head->head.classes, 1})
                   : empty_like_x(x, program.sizes, program.layout);
  if (x.size(0) == 0) return result;
  if (runs_pairs(program, weights)) {
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
