// Runs kernels by the PTX that nvcc made of them (ptx/machine.h). A case says where that is: `ptx=file`; with
// `counts=file` what was executed is written there, a line an opcode.
#pragma once

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "buffer.h"
#include "case.h"
#include "ptx/machine.h"

namespace shufflenet::cuda {

// Returns the kernel of a PTX file whose name contains `name`. Each is read once.
inline const ptx::Kernel& kernel_of(const std::string& file, const std::string& name) {
  static std::map<std::pair<std::string, std::string>, ptx::Kernel> kernels;
  const auto [found, is_new] = kernels.try_emplace({file, name});
  if (is_new) {
    std::ifstream in(file);
    std::ostringstream text;
    text << in.rdbuf();
    if (!in) throw ptx::Error("cannot read " + file);
    found->second = ptx::read_kernel(text.str(), name);
  }
  return found->second;
}

inline void write_counts(const ptx::Machine& machine, const std::string& file) {
  std::ofstream out(file);
  out << "opcode\texecuted\tshared_accesses\tshared_wavefronts\tglobal_bytes\tglobal_sectors\n";
  for (const auto& [opcode, count] : machine.counts_by_opcode()) {
    out << opcode << '\t' << count.executed << '\t' << count.shared_accesses << '\t' << count.shared_wavefronts << '\t'
        << count.global_bytes << '\t' << count.global_sectors << '\n';
  }
}

// Launches the kernel whose name contains `name`. It may write the buffer that begins at `result`, nothing else, and
// read all other buffers.
template <class Arguments>
void launch_ptx(const Case& c, const std::string& name, int64_t blocks, int threads, int64_t shared_bytes,
                const Arguments& arguments, const void* result) {
  ptx::Machine machine(kernel_of(c.text("ptx", ""), name), static_cast<uint64_t>(c.number("seed", 0)));
  for (const Allocation& allocation : allocations()) {
    const bool is_result = allocation.data == result;
    machine.global.add(is_result ? "the result" : "an input", allocation.data, allocation.bytes,
                       is_result ? ptx::GlobalMemory::Use::write : ptx::GlobalMemory::Use::read);
  }
  machine.launch({blocks}, threads, shared_bytes, &arguments);
  if (const std::string file = c.text("counts", ""); !file.empty()) write_counts(machine, file);
}

}  // namespace shufflenet::cuda
