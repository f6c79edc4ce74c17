// Kernels of a few lines of PTX, run on values of the test's.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "../ptx/machine.h"

namespace ptx_test {

inline int checks = 0, failed = 0;

inline void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failed;
  std::printf("failed: %s\n", what.c_str());
}

// A kernel that gets the addresses of `in` and `out` in registers, and its thread's number in %t.
inline std::string module(const std::string& body) {
  return ".version 9.0\n.target sm_90\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
         ".visible .entry test(\n.param .u64 test_param_0,\n.param .u64 test_param_1\n)\n{\n"
         ".reg .b64 %in, %out;\n.reg .b32 %t;\n"
         "ld.param.u64 %in, [test_param_0];\nld.param.u64 %out, [test_param_1];\nmov.u32 %t, %tid.x;\n" +
         body + "\nret;\n}\n";
}

struct Result {
  std::string error;  // empty where the kernel ran
  std::map<std::string, ptx::Count> counts;
};

template <class In, class Out>
Result run(const std::string& body, const std::vector<In>& in, std::vector<Out>& out, int threads = 32,
           int64_t shared_bytes = 0, uint64_t seed = 0) {
  const void* parameters[2] = {in.data(), out.data()};
  try {
    const ptx::Kernel kernel = ptx::read_kernel(module(body), "test");
    ptx::Machine machine(kernel, seed);
    machine.global.add("in", in.data(), static_cast<int64_t>(in.size() * sizeof(In)), ptx::GlobalMemory::Use::read);
    machine.global.add(
        "out", out.data(), static_cast<int64_t>(out.size() * sizeof(Out)), ptx::GlobalMemory::Use::write);
    machine.launch({}, threads, shared_bytes, parameters);
    return {"", machine.counts_by_opcode()};
  } catch (const ptx::Error& error) {
    return {error.what(), {}};
  }
}

}  // namespace ptx_test
