// A warp as its instructions see it: registers, predicates, memory, and copies that are under way.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "counts.h"
#include "instruction.h"
#include "memory.h"

namespace ptx {

// A copy of cp.async: `given` bytes of global memory, and zeros up to `bytes`.
struct Copy {
  uint64_t to, from;
  int bytes, given;
};

// A lane's asynchronous copies (PTX ISA, "cp.async.commit_group", "cp.async.wait_group").
struct Copies {
  std::vector<Copy> open;                 // not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

class Warp {
 public:
  Warp(const Kernel& kernel, int index, SharedMemory& shared, GlobalMemory& global, const unsigned char* parameters)
      : index(index), shared(shared), global(global), parameters(parameters), parameter_bytes(kernel.parameter_bytes) {}

  // Before a block: registers and predicates hold what the kernel says, or poison.
  void start(const Kernel& kernel, int warps) {
    registers_ = kernel.registers;
    predicates = kernel.predicates;
    copies.assign(kLanes, {});
    seen.assign(static_cast<size_t>(warps), 0);
  }

  template <class T>
  T* row(const Operand& operand) {
    return reinterpret_cast<T*>(registers_.data() + operand.at);
  }
  uint32_t* special(uint32_t at) { return reinterpret_cast<uint32_t*>(registers_.data() + at); }

  // Returns the mask of a predicate.
  uint32_t mask(const Operand& operand) const {
    return operand.negated ? ~predicates[operand.at] : predicates[operand.at];
  }
  void set_mask(const Operand& operand, uint32_t lanes, uint32_t mask) {
    if (operand.kind == Operand::Kind::sink) return;
    uint32_t& predicate = predicates[operand.at];
    predicate = (predicate & ~lanes) | (mask & lanes);
  }

  // A lane's value, where a register may be wider than what an instruction takes of it or puts into it (PTX ISA,
  // "Operand Size Exceeding Instruction-Type Size").
  uint64_t value(const Operand& operand, int lane) {
    switch (operand.bytes) {
      case 2: return row<uint16_t>(operand)[lane];
      case 4: return row<uint32_t>(operand)[lane];
      default: return row<uint64_t>(operand)[lane];
    }
  }
  void set_value(const Operand& operand, int lane, uint64_t value) {
    switch (operand.bytes) {
      case 0: return;  // `_`, where a result is not wanted
      case 2: row<uint16_t>(operand)[lane] = static_cast<uint16_t>(value); return;
      case 4: row<uint32_t>(operand)[lane] = static_cast<uint32_t>(value); return;
      default: row<uint64_t>(operand)[lane] = value;
    }
  }

  Observer observer(int lane) const { return {index * kLanes + lane, *now, seen.data()}; }

  const int index;
  SharedMemory& shared;
  GlobalMemory& global;
  const unsigned char* const parameters;
  const int64_t parameter_bytes;
  std::vector<Copies> copies;  // by lane
  std::vector<uint32_t> predicates;
  Count* count = nullptr;         // of the instruction that is executed
  const uint32_t* now = nullptr;  // the block's time
  std::vector<uint32_t> seen;     // see Observer

 private:
  std::vector<unsigned char> registers_;
};

template <class Do>
void for_each_lane(uint32_t lanes, const Do& act) {
  for (; lanes; lanes &= lanes - 1) act(__builtin_ctz(lanes));
}

// An instruction with .sync or .aligned, which all lanes that it names execute together.
inline void require_whole(uint32_t lanes, uint32_t members) {
  if (lanes == members) return;
  throw Error("a divided warp: lanes " + std::to_string(lanes) + " of " + std::to_string(members) + " (as bits)");
}

}  // namespace ptx
