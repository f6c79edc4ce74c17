// card_host.cpp of the first contact's rehearsal, with a planted fault where the environment's FAULT asks for one: a
// launch that does "nothing", or one that also writes "outside" of the result.
#define launch launch_right
#include "card_host.cpp"
#undef launch

namespace shufflenet::cuda {

void launch(const KernelArguments& arguments, Dtype dtype, Layout layout, int64_t shared_bytes, void* stream) {
  const char* const found = std::getenv("FAULT");
  const std::string fault = found == nullptr ? "" : found;
  if (fault != "nothing") launch_right(arguments, dtype, layout, shared_bytes, stream);
  if (fault == "outside") static_cast<char*>(arguments.result)[-1] = 0;
}

}  // namespace shufflenet::cuda
