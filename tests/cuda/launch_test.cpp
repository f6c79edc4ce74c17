// csrc/cuda/launch.cu on the runtime of fake_runtime.h. Prints, line by line, what the functions of kernels.h answer
// and then the runtime's calls, each behind the device that was current. Arguments: what to do, see main.
#include "fake_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>

#include "case.h"
#include "launch.cu"

namespace shufflenet::cuda {
namespace {

const char kernels[2 * kDtypes] = {}, strip_kernels[9] = {};
const void* kernel_of(Dtype dtype, Layout layout) {
  return &kernels[2 * static_cast<int>(dtype) + static_cast<int>(layout)];
}

void say(const std::string& text) { std::printf("%s\n", text.c_str()); }

// Launches a unit of stage 2, which takes more than 48 KB, as ops.cpp does.
void launch_on(int index, const std::string& dtype = "float16", int64_t spare_bytes = 0) {
  try {
    const Case c("n=2 in=240 mid=60 out=240 h=28 w=28 sm=90 layout=nhwc dtype=" + dtype);
    const Unit unit = c.unit();
    const Plan plan = plan_unit(unit, c.dtype(), c.device());
    const Sizes s = sizes_of(unit);
    const SharedLayout layout(s, plan.tiling, unit.layout, element_bytes(c.dtype()), accumulator_bytes(c.dtype()));
    const CurrentDevice current(index);
    launch({s, plan.tiling, layout, nullptr, {}, {}, {}, nullptr}, c.dtype(), unit.layout,
           plan.shared_bytes + spare_bytes, nullptr);
  } catch (const std::exception& error) {
    say(error.what());
  }
}

// Launches a unit of stage 2 by strips, as ops.cpp does.
void launch_strips_on(int index) {
  try {
    const Case c("n=2 in=240 mid=60 out=240 h=28 w=28 sm=90 layout=nhwc dtype=float16");
    const StripPlan plan = plan_strips(c.unit(), c.dtype(), c.device());
    const Sizes s = sizes_of(c.unit());
    const StripLayout layout(s, plan.tiling, c.unit().layout, element_bytes(c.dtype()));
    const CurrentDevice current(index);
    launch_pack({s, plan.tiling.slices, layout.packed, {}, {}, {}, nullptr}, plan, c.dtype(), nullptr);
    launch_strips({s, plan.tiling, layout, nullptr, nullptr, nullptr}, plan, c.dtype(), nullptr);
  } catch (const std::exception& error) {
    say(error.what());
  }
}

void on_a_fresh_thread(const std::function<void()>& work) { std::thread(work).join(); }

}  // namespace

StripKernels strip_kernels_float16() { return {&strip_kernels[0], &strip_kernels[1], &strip_kernels[2]}; }
StripKernels strip_kernels_bfloat16() { return {&strip_kernels[3], &strip_kernels[4], &strip_kernels[5]}; }
StripKernels strip_kernels_tfloat32() { return {&strip_kernels[6], &strip_kernels[7], &strip_kernels[8]}; }
const void* kernel_float32(Layout layout) { return kernel_of(Dtype::float32, layout); }
const void* kernel_float64(Layout layout) { return kernel_of(Dtype::float64, layout); }
const void* kernel_bfloat16(Layout layout) { return kernel_of(Dtype::bfloat16, layout); }
const void* kernel_float16(Layout layout) { return kernel_of(Dtype::float16, layout); }
const void* kernel_tfloat32(Layout layout) { return kernel_of(Dtype::tfloat32, layout); }

}  // namespace shufflenet::cuda

int main(int, char** arguments) {
  using namespace shufflenet::cuda;
  const std::string what = arguments[1];
  if (what == "versions") {
    say(std::to_string(runtime_version()) + " " + std::to_string(driver_version()));
  } else if (what == "properties") {
    say(std::to_string(device_properties(1).compute_capability));
    device_properties(1);
  } else if (what == "strips") {  // twice
    launch_strips_on(0);
    launch_strips_on(0);
  } else if (what == "card") {  // of this compute capability
    fake::compute_capability = std::atoi(arguments[2]);
    say(device_error(0));
  } else if (what == "driver") {  // of this version, with which asking for a card ends in this error
    fake::driver = std::atoi(arguments[2]);
    const std::map<std::string, cudaError_t> errors = {
        {"cudaErrorInsufficientDriver", cudaErrorInsufficientDriver},
        {"cudaErrorNoDevice", cudaErrorNoDevice},
        {"cudaErrorUnknown", cudaErrorUnknown}};
    fake::failing["cudaDeviceGetAttribute"] = errors.at(arguments[3]);
    say(device_error(0));
  } else if (what == "device") {  // on a fresh thread, where these devices have a context: a launch on device 1
    for (char** context = arguments + 2; *context != nullptr; ++context) fake::contexts.insert(std::atoi(*context));
    on_a_fresh_thread([] {
      launch_on(1);
      say("then " + std::to_string(fake::device) + " is current");
    });
    for (int index : fake::contexts) say("context on " + std::to_string(index));
  } else if (what == "launches") {  // of two plans and two dtypes, on two devices
    for (int index : {0, 1}) {
      for (int time = 0; time < 2; ++time) {
        fake::calls.push_back("float16");
        launch_on(index);
      }
    }
    fake::calls.push_back("float16, more bytes");
    launch_on(0, "float16", 4096);
    fake::calls.push_back("bfloat16");
    launch_on(0, "bfloat16");
  } else if (what == "capture") {  // the first launch, while a stream is captured
    fake::is_capturing = true;
    launch_on(0);
    say(fake::mode == cudaStreamCaptureModeGlobal ? "as strict as before" : "relaxed");
  } else if (what == "refused") {  // by the function of this name, because the card has no code
    fake::failing[arguments[2]] = cudaErrorNoKernelImageForDevice;
    launch_on(1);
    say("then " + std::to_string(fake::device) + " is current");
  }
  say("calls:");
  for (const std::string& call : fake::calls) say(call);
}
