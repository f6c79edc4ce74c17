// card_host.cpp of the first contact's rehearsal, with a planted fault where the environment's FAULT asks for one: a
// launch that does "nothing", or one that also writes "outside" of the result.
#define launch launch_right
#define launch_strips launch_strips_right
#include "card_host.cpp"
#undef launch
#undef launch_strips

namespace shufflenet::cuda {
namespace {

template <class Launch>
void with_fault(void* result, const Launch& launch) {
  const char* const found = std::getenv("FAULT");
  const std::string fault = found == nullptr ? "" : found;
  if (fault != "nothing") launch();
  if (fault == "outside") static_cast<char*>(result)[-1] = 0;
}

}  // namespace

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream) {
  with_fault(arguments.result, [&] { launch_right(arguments, dtype, layout, shared_bytes, stream); });
}
void launch_strips(const StripArguments& arguments, const StripPlan& plan, Dtype dtype, void* stream) {
  with_fault(arguments.result, [&] { launch_strips_right(arguments, plan, dtype, stream); });
}

}  // namespace shufflenet::cuda
