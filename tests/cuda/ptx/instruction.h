// A kernel as it is executed: instructions whose opcode is a function, and whose operands are places in a warp's
// registers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "value.h"

namespace ptx {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// A register is a row of 32 values, one a lane, `bytes` each. Immediate values and special registers are rows too, so
// that whatever an instruction reads is read in one way. Predicates are not: each is a mask of the lanes.
struct Operand {
  enum class Kind { row, predicate, number, address, name, sink };
  Kind kind = Kind::sink;
  uint32_t at = 0;       // where the row begins in a warp's registers; which predicate
  uint8_t bytes = 0;     // of a lane's value; of an address, 0 where no register is part of it
  bool negated = false;  // of a predicate
  uint64_t number = 0;   // an immediate value; of an address, what is added to the register
  std::string name;      // a label
};

class Warp;
struct Instruction;
// Executes an instruction for the lanes of a mask, which is never empty.
using Execute = void (*)(Warp&, const Instruction&, uint32_t lanes);

enum class Space { generic, global, shared, param };
// What setp does to its result and a further predicate.
enum class Combine { none, with_and, with_or, with_xor };
// What bar.red tells all threads of their predicates: whether any or all are true, or how many.
enum class Poll { none, any, all, number };

struct Instruction {
  enum class Flow { next, branch, exit, barrier, warp_barrier };
  Flow flow = Flow::next;
  Execute execute = nullptr;
  std::vector<Operand> operands;  // those in braces one by one
  int guard = -1;                 // a predicate; -1 where there is none
  bool guard_negated = false;
  int target = -1;   // of a branch
  int join = -1;     // of a branch, where lanes that part here meet again; -1 where they do not
  int outcomes = 0;  // of a comparison, those for which it holds
  Combine combine = Combine::none;
  Poll poll = Poll::none;  // of a barrier: its operands are its number {, threads} {, a predicate, the result}
  // An access to memory has `count` elements of `bytes` bytes; a conversion of integers, what it takes and gives.
  Space space = Space::generic;
  int bytes = 0, count = 1;
  bool is_signed = false;
  int result_bytes = 0;
  bool result_is_signed = false;
  int line = 0;  // in the PTX
  std::string opcode, text;
};

// Registers whose value is known when a warp starts.
enum class Special {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<unsigned char> registers;  // a warp's rows as it starts: immediate values, and poison elsewhere
  std::map<Special, uint32_t> specials;  // their rows
  std::vector<uint32_t> predicates;      // the same of predicates
  int64_t parameter_bytes = 0;
  int64_t static_shared_bytes = 0;  // shared memory beside what a launch asks for, which follows it
  int max_threads = 0;              // 0 where the kernel does not say
};

}  // namespace ptx
