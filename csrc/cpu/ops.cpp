// The ops on the CPU: tensors in, a Unit and raw pointers out to the kernels, split over torch's threads.
#include <cmath>
#include <cstdlib>
#include <deque>
#include <memory>

#include "../ops.h"
#include "kernels.h"
#include "partition.h"
#include "phases.h"

namespace shufflenet::cpu {

// Memory that a thread keeps from call to call, so that no call pays for fresh pages. It grows to the most that the
// thread has needed.
class Scratch {
 public:
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = ceil_div(bytes, kScratchAlignment) * kScratchAlignment;
      memory_.reset(std::aligned_alloc(kScratchAlignment, rounded));
      if (!memory_) fail("could not allocate ", rounded, " bytes of scratch memory");
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// At most kScratchBudget each, but for units one row of which needs more. A thread's buffers are those of the part that
// it runs, or that threads it called run together.
static thread_local Scratch thread_buffers, thread_scratch;

// What a chain of units hands on, in turn; whole images, as large as the largest.
static thread_local Scratch thread_images[2];

// The convolution's arrays in the accumulator type A: the arguments' own memory where it has that type.
template <class A>
class ConvolutionData {
 public:
  explicit ConvolutionData(const ConvolutionArguments& conv) {
    const int64_t channels = conv.weight.size(0);
    pointers.weight = values(conv.weight);
    if (conv.norm) {
      const A* mean = values(conv.norm->running_mean);
      const A* var = values(conv.norm->running_var);
      const A* weight = values(conv.norm->weight);
      const A* bias = values(conv.norm->bias);
      A* const scale = filled(channels, 1);
      A* const shift = filled(channels, 0);
      const A eps = static_cast<A>(conv.norm->eps);
      for (int64_t c = 0; c < channels; ++c) scale[c] = weight[c] / std::sqrt(var[c] + eps);
      for (int64_t c = 0; c < channels; ++c) shift[c] = bias[c] - mean[c] * scale[c];
      pointers.scale = scale;
      pointers.bias = shift;
    } else {
      pointers.bias = conv.bias ? values(*conv.bias) : filled(channels, 0);
    }
  }

  // Moving leaves the arrays where they are, and `pointers` true.
  ConvolutionData(ConvolutionData&&) = default;

  Convolution pointers;

 private:
  const A* values(const Tensor& tensor) {
    const Tensor contiguous = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    kept_.push_back(contiguous);
    const Dtype dtype = dtype_of("weight", contiguous);
    const bool same = dtype == (std::is_same_v<A, double> ? Dtype::float64 : Dtype::float32);
    if (same) return static_cast<const A*>(contiguous.const_data_ptr());
    A* const converted = filled(contiguous.numel(), 0);
    isa().unit_kernel(dtype).to_accumulator(contiguous.const_data_ptr(), converted, contiguous.numel());
    return converted;
  }
  A* filled(int64_t n, A value) {
    buffers_.emplace_back(n, value);
    return buffers_.back().data();
  }

  std::vector<Tensor> kept_;
  std::deque<std::vector<A>> buffers_;
};

// One thread runs all phases of a part.
static void run_alone(const UnitKernel& kernel, const Unit& unit, const UnitPointers& pointers, const Part& part) {
  const Channels mid = {0, unit.mid_channels};
  void* const buffers = thread_buffers.reserve(kernel.buffer_bytes(unit, part));
  void* const scratch = thread_scratch.reserve(kernel.scratch_bytes(unit, part, mid));
  kernel.prepare(unit, part, buffers);
  kernel.stage(unit, pointers, part, {0, unit.in_channels}, buffers);
  kernel.expand(unit, pointers, part, mid, buffers, scratch);
  if (unit.has_conv3()) kernel.project(unit, pointers, part, {0, unit.result_channels()}, buffers, scratch);
}

// Several threads share each phase of a part, by channels: nothing is computed twice.
static void run_together(const UnitKernel& kernel, const Unit& unit, const UnitPointers& pointers, const Part& part,
                         int64_t workers) {
  void* const buffers = thread_buffers.reserve(kernel.buffer_bytes(unit, part));
  kernel.prepare(unit, part, buffers);
  // `workers` shares of n channels, in multiples of `unit_size`.
  const auto share = [workers](int64_t n, int64_t unit_size, int64_t i) {
    const int64_t units = ceil_div(n, unit_size);
    return Channels{std::min(n, units * i / workers * unit_size), std::min(n, units * (i + 1) / workers * unit_size)};
  };
  run_phases(workers, 3, [&](int64_t phase, int64_t i) {
    if (phase == 0) {
      kernel.stage(unit, pointers, part, share(unit.in_channels, 16, i), buffers);
    } else if (phase == 1) {
      // Whole multiples of the groups leave each of conv1's groups an equal share of its rows.
      const Channels channels = share(unit.mid_channels, unit.groups, i);
      void* const scratch = thread_scratch.reserve(kernel.scratch_bytes(unit, part, channels));
      kernel.expand(unit, pointers, part, channels, buffers, scratch);
    } else if (unit.has_conv3()) {
      void* const scratch = thread_scratch.reserve(kernel.scratch_bytes(unit, part, {}));
      kernel.project(unit, pointers, part, share(unit.result_channels(), 1, i), buffers, scratch);
    }
  });
}

// A unit ready to run: checked, its arrays in the accumulator type A.
template <class A>
struct PreparedUnit {
  PreparedUnit(const UnitArguments& arguments, const Unit& unit)
      : unit(unit), conv1(arguments.conv1), conv2(arguments.conv2) {
    if (arguments.conv3) conv3.emplace(*arguments.conv3);
  }
  UnitPointers pointers(const void* x, void* result) const {
    return {x, conv1.pointers, conv2.pointers, conv3 ? conv3->pointers : Convolution{}, result};
  }

  Unit unit;
  ConvolutionData<A> conv1, conv2;
  std::optional<ConvolutionData<A>> conv3;
};

static void run_unit(const UnitKernel& kernel, int64_t lanes, const Unit& unit, const UnitPointers& pointers,
                     int64_t threads) {
  const Partition partition = choose_partition(unit, kernel, lanes, threads);
  if (partition.workers_per_part > 1) {
    for (int64_t i = 0; i < partition.parts(unit); ++i) {
      run_together(kernel, unit, pointers, partition.part(unit, i), partition.workers_per_part);
    }
    return;
  }
  const auto run_parts = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_alone(kernel, unit, pointers, partition.part(unit, i));
  };
  if (threads == 1) {
    run_parts(0, partition.parts(unit));
  } else {
    torch::stable::parallel_for(0, partition.parts(unit), 1, run_parts);
  }
}

// Runs units one behind the other. What they hand on stays in two buffers a thread: as many whole images as there are
// threads go through all units on one thread each, and stay in its caches; the threads share the images that are left.
template <class A>
static void run_chain(const std::vector<PreparedUnit<A>>& units, const Tensor& x, const Tensor& result) {
  const Isa& isa = cpu::isa();
  const UnitKernel kernel = isa.unit_kernel(dtype_of("x", x));
  const int64_t lanes = isa.vector_bytes / static_cast<int64_t>(sizeof(A));
  const int64_t threads = torch::stable::get_num_threads();
  if (units.size() == 1) {
    const PreparedUnit<A>& only = units[0];
    run_unit(kernel, lanes, only.unit, only.pointers(x.const_data_ptr(), result.mutable_data_ptr()), threads);
    return;
  }
  const auto image_bytes = [&](const Unit& unit) {
    return unit.result_channels() * unit.out_height() * unit.out_width() * static_cast<int64_t>(x.element_size());
  };
  int64_t largest = 0;
  for (size_t i = 0; i + 1 < units.size(); ++i) largest = std::max(largest, image_bytes(units[i].unit));
  const int64_t batch = units[0].unit.batch;
  const int64_t x_bytes = x.numel() / batch * static_cast<int64_t>(x.element_size());
  const int64_t result_bytes = image_bytes(units.back().unit);

  const auto run_image = [&](int64_t image, int64_t image_threads) {
    const char* from = static_cast<const char*>(x.const_data_ptr()) + image * x_bytes;
    for (size_t i = 0; i < units.size(); ++i) {
      Unit unit = units[i].unit;
      unit.batch = 1;
      char* const to = i + 1 < units.size() ? static_cast<char*>(thread_images[i % 2].reserve(largest))
                                            : static_cast<char*>(result.mutable_data_ptr()) + image * result_bytes;
      run_unit(kernel, lanes, unit, units[i].pointers(from, to), image_threads);
      from = to;
    }
  };
  const int64_t alone = batch / threads * threads;
  torch::stable::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) run_image(image, 1);
  });
  for (int64_t image = alone; image < batch; ++image) run_image(image, threads);
}

template <class A>
static Tensor prepare_and_run(const std::vector<UnitArguments>& chain, const std::vector<Unit>& units, const Tensor& x,
                              const Tensor& result) {
  std::vector<PreparedUnit<A>> prepared;
  for (size_t i = 0; i < chain.size(); ++i) prepared.emplace_back(chain[i], units[i]);
  run_chain(prepared, x, result);
  return result;
}

// Each unit works on the result of the one before, the first on given_x.
static Tensor run(const Tensor& given_x, const std::vector<UnitArguments>& chain) {
  Sizes sizes = check_x(given_x);  // before its strides are asked for
  const Layout layout = layout_of(given_x);
  std::vector<Unit> units;
  for (const UnitArguments& arguments : chain) {
    units.push_back(check_unit(arguments, sizes, layout));
    const Unit& unit = units.back();
    sizes = {unit.batch, unit.result_channels(), unit.out_height(), unit.out_width()};
  }
  const Tensor x = dense(given_x, layout);
  const Tensor result = empty_like_x(x, sizes, layout);
  if (x.size(0) == 0) return result;
  if (dtype_of("x", x) == Dtype::float64) return prepare_and_run<double>(chain, units, x, result);
  return prepare_and_run<float>(chain, units, x, result);
}

}  // namespace shufflenet::cpu

STABLE_TORCH_LIBRARY_IMPL(shufflenet_ext, CPU, m) { shufflenet::Ops<shufflenet::cpu::run>::implement(m); }
