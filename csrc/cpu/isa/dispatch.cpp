// Which ISA's kernels run: the most capable that this processor has, unless one is forced.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa.h"

namespace shufflenet::cpu {

// The least capable first.
static std::vector<const Isa*> compiled_isas() {
#if defined(__aarch64__)
  return {&neon_isa};
#elif defined(__x86_64__)
  // Intel's AVX512-BF16 does half of the multiply-adds that its float has (measured: a dot product in two cycles).
  const bool fast_dot_products = !__builtin_cpu_is("intel");
  const Isa* const bf16[] = {&avx512_isa, &avx512_bf16_isa};
  return {&baseline_isa, &avx2_isa, bf16[!fast_dot_products], bf16[fast_dot_products], &amx_isa};
#else
  return {&baseline_isa};
#endif
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa* candidate : compiled_isas()) {
    if (candidate->is_usable()) names.emplace_back(candidate->name());
  }
  return names;
}

static const Isa& find_isa(const std::string& name, const char* argument) {
  std::string expected;
  for (const Isa* candidate : compiled_isas()) {
    if (!candidate->is_usable()) continue;
    if (name == candidate->name()) return *candidate;
    expected += (expected.empty() ? "" : ", ") + std::string(candidate->name());
  }
  throw std::invalid_argument(
      std::string(argument) + ": got '" + name + "', expected one that this processor has (" + expected + ")");
}

static std::atomic<const Isa*>& selected_isa() {
  static std::atomic<const Isa*> selected = [] {
    const char* forced = std::getenv("SHUFFLENET_EXT_CPU_ISA");
    if (forced && *forced) return &find_isa(forced, "SHUFFLENET_EXT_CPU_ISA");
    return &find_isa(usable_isas().back(), "isa");
  }();
  return selected;
}

const Isa& isa() { return *selected_isa().load(std::memory_order_relaxed); }

void select_isa(const std::string& name) { selected_isa().store(&find_isa(name, "isa")); }

}  // namespace shufflenet::cpu
