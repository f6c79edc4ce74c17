// Makes instructions of statements: finds what executes an opcode, and binds its operands.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "access.h"
#include "compare.h"
#include "convert.h"
#include "exchange.h"
#include "flow.h"
#include "matrix.h"
#include "parse.h"
#include "scalar.h"

namespace ptx {

// The opcodes that are functions of one lane's values.
inline const Operations& operations() {
  static const Operations known = [] {
    Operations made;
    add_scalar(made);
    add_conversions(made);
    return made;
  }();
  return known;
}

// Opcodes that the lanes of a warp execute together, on registers of 32 bits, predicates and addresses.
inline const std::map<std::string, Execute>& warp_operations() {
  static const std::map<std::string, Execute> known = {
      {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", load_matrices<1, false>},
      {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", load_matrices<2, false>},
      {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", load_matrices<4, false>},
      {"ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16", load_matrices<1, true>},
      {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", load_matrices<2, true>},
      {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", load_matrices<4, true>},
      {"stmatrix.sync.aligned.m8n8.x1.shared.b16", store_matrices<1, false>},
      {"stmatrix.sync.aligned.m8n8.x2.shared.b16", store_matrices<2, false>},
      {"stmatrix.sync.aligned.m8n8.x4.shared.b16", store_matrices<4, false>},
      {"stmatrix.sync.aligned.m8n8.x1.trans.shared.b16", store_matrices<1, true>},
      {"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16", store_matrices<2, true>},
      {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", store_matrices<4, true>},
      {"movmatrix.sync.aligned.m8n8.trans.b16", transpose_matrix},
      {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", multiply_matrices<Half, 8>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply_matrices<Half, 16>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", multiply_matrices<BFloat, 8>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply_matrices<BFloat, 16>},
      {"mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", multiply_matrices<TFloat, 4>},
      {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", multiply_matrices<TFloat, 8>},
      {"shfl.sync.up.b32", shuffle<Shuffle::up>},
      {"shfl.sync.down.b32", shuffle<Shuffle::down>},
      {"shfl.sync.bfly.b32", shuffle<Shuffle::bfly>},
      {"shfl.sync.idx.b32", shuffle<Shuffle::idx>},
      {"vote.sync.all.pred", vote<Vote::all>},
      {"vote.sync.any.pred", vote<Vote::any>},
      {"vote.sync.uni.pred", vote<Vote::uni>},
      {"vote.sync.ballot.b32", vote<Vote::ballot>},
      {"redux.sync.add.s32", reduce<Add, int32_t>},
      {"redux.sync.add.u32", reduce<Add, uint32_t>},
      {"redux.sync.min.s32", reduce<Minimum, int32_t>},
      {"redux.sync.min.u32", reduce<Minimum, uint32_t>},
      {"redux.sync.max.s32", reduce<Maximum, int32_t>},
      {"redux.sync.max.u32", reduce<Maximum, uint32_t>},
      {"redux.sync.and.b32", reduce<And, uint32_t>},
      {"redux.sync.or.b32", reduce<Or, uint32_t>},
      {"redux.sync.xor.b32", reduce<ExclusiveOr, uint32_t>},
      {"activemask.b32", active_mask},
      {"cp.async.commit_group", commit_copies},
      {"cp.async.wait_group", wait_group},
      {"cp.async.wait_all", wait_all}};
  return known;
}

// mov of a register's parts to or from smaller registers: {low, high}.
inline void split_register(Warp& warp, const Instruction& x, uint32_t lanes) {
  const int parts = static_cast<int>(x.operands.size()) - 1, bits = 8 * x.bytes / parts;
  for_each_lane(lanes, [&](int lane) {
    const uint64_t value = warp.value(x.operands[parts], lane);
    for (int i = 0; i < parts; ++i) warp.set_value(x.operands[i], lane, value >> i * bits);
  });
}
inline void join_registers(Warp& warp, const Instruction& x, uint32_t lanes) {
  const int parts = static_cast<int>(x.operands.size()) - 1, bits = 8 * x.bytes / parts;
  for_each_lane(lanes, [&](int lane) {
    uint64_t value = 0;
    for (int i = 0; i < parts; ++i) value |= warp.value(x.operands[i + 1], lane) << i * bits;
    warp.set_value(x.operands[0], lane, value);
  });
}

inline void do_nothing(Warp&, const Instruction&, uint32_t) {}

class Decoder {
 public:
  static Kernel decode(const Listing& listing) { return Decoder(listing).decode(); }

 private:
  explicit Decoder(const Listing& listing) : listing_(listing) {
    kernel_.name = listing.name;
    kernel_.registers = listing.registers;
    kernel_.specials = listing.specials;
    kernel_.predicates.assign(listing.predicates, 0x5a5a5a5au);  // poison: true for some lanes
    kernel_.parameter_bytes = listing.parameter_bytes;
    kernel_.static_shared_bytes = listing.static_shared_bytes;
    kernel_.max_threads = listing.max_threads;
  }

  Kernel decode() {
    for (const Statement& statement : listing_.statements) {
      try {
        kernel_.code.push_back(instruction(statement));
      } catch (const Error& error) {
        throw Error(std::string(error.what()) + ", line " + std::to_string(statement.line) + ": " + statement.text);
      }
    }
    find_joins(kernel_.code);
    return std::move(kernel_);
  }

  Instruction instruction(const Statement& statement) {
    Instruction x;
    x.guard = statement.guard;
    x.guard_negated = statement.guard_negated;
    x.opcode = statement.opcode;
    x.text = statement.text;
    x.line = statement.line;
    for (const auto& parts : statement.operands) x.operands.insert(x.operands.end(), parts.begin(), parts.end());

    const std::string opcode = without(statement.opcode, "::cta");  // the block's own, which is the default
    const std::vector<std::string> words = split(opcode, '.');
    const auto operation = operations().find(opcode);
    const auto warp_operation = warp_operations().find(opcode);
    if (words[0] == "mov" && x.operands.size() > 2) {
      x.execute = statement.operands[0].size() > 1 ? split_register : join_registers;
      x.bytes = bytes_of_type(words.back());
      for (Operand& operand : x.operands) {
        bind_number(operand, static_cast<int>(x.bytes / (x.operands.size() - 1)));
      }
    } else if (operation != operations().end()) {
      x.execute = operation->second.execute;
      bind(x, operation->second);
    } else if (warp_operation != warp_operations().end()) {
      x.execute = warp_operation->second;
      for (Operand& operand : x.operands) bind_number(operand, 4);
    } else if (words[0] == "setp") {
      decode_comparison(x, words);
    } else if (words[0] == "cvt" && words.size() == 3 && is_integer(words[1]) && is_integer(words[2])) {
      x.execute = convert_integer;
      x.result_bytes = bytes_of_type(words[1]);
      x.result_is_signed = words[1][0] == 's';
      x.bytes = bytes_of_type(words[2]);
      x.is_signed = words[2][0] == 's';
      for (Operand& operand : x.operands) bind_number(operand, x.bytes);
    } else if (words[0] == "ld" || words[0] == "st") {
      decode_access(x, words);
    } else if (opcode.rfind("cp.async.c", 0) == 0 && words.size() >= 5) {
      decode_copy(x, words);
    } else {
      decode_flow(x, opcode, words);
    }
    return x;
  }

  static std::string without(std::string text, const std::string& part) {
    for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
    return text;
  }

  static bool is_integer(const std::string& type) { return type[0] == 's' || type[0] == 'u'; }

  void decode_comparison(Instruction& x, const std::vector<std::string>& words) {
    const auto execute = comparisons().find(words.back());
    if (execute == comparisons().end() || words.size() < 3) throw Error("an opcode that is not known");
    x.execute = execute->second;
    x.outcomes = outcomes_of(words[1]);
    if (words.size() > 3) {
      x.combine = words[2] == "and" ? Combine::with_and : words[2] == "or" ? Combine::with_or : Combine::with_xor;
    }
    const auto bytes = static_cast<uint8_t>(bytes_of_type(words.back()));
    bind(x, {x.execute, {0, bytes, bytes, 0}, x.combine == Combine::none ? 3 : 4, false});
  }

  void bind(Instruction& x, const Operation& operation) {
    if (static_cast<int>(x.operands.size()) != operation.operands) throw Error("other operands than expected");
    for (int i = 0; i < operation.operands; ++i) {
      Operand& operand = x.operands[i];
      const int bytes = operation.bytes[i];
      bind_number(operand, bytes);
      const bool fits =
          operand.kind == Operand::Kind::predicate
              ? bytes == 0
              : bytes != 0 && operand.kind == Operand::Kind::row &&
                    (operation.takes_wider_registers ? operand.bytes >= bytes : operand.bytes == bytes);
      if (!fits) throw Error("an operand of another type than expected");
    }
  }

  // Makes a row of an immediate value, or a predicate where it has 0 bytes.
  void bind_number(Operand& operand, int bytes) {
    if (operand.kind != Operand::Kind::number) return;
    const auto [known, is_new] = numbers_.try_emplace({bytes, operand.number}, operand);
    Operand& row = known->second;
    if (is_new && bytes == 0) {
      row.kind = Operand::Kind::predicate;
      row.at = static_cast<uint32_t>(kernel_.predicates.size());
      kernel_.predicates.push_back(operand.number ? kAllLanes : 0);
    } else if (is_new) {
      row.kind = Operand::Kind::row;
      row.bytes = static_cast<uint8_t>(std::max(bytes, 2));
      row.at = add_row(kernel_.registers, row.bytes);
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&kernel_.registers[row.at + static_cast<size_t>(lane) * row.bytes], &operand.number, row.bytes);
      }
    }
    operand = row;
  }

  // ld, st: what is said of caches, and of how weak the access is, changes nothing here.
  void decode_access(Instruction& x, const std::vector<std::string>& words) {
    for (size_t i = 1; i + 1 < words.size(); ++i) {
      const std::string& word = words[i];
      if (word == "global") {
        x.space = Space::global;
      } else if (word == "shared") {
        x.space = Space::shared;
      } else if (word == "param") {
        x.space = Space::param;
      } else if (word == "v2" || word == "v4" || word == "v8") {
        x.count = word[1] - '0';
      } else if (word != "nc" && word != "weak" && word != "volatile" && word[0] != 'L') {
        throw Error("an opcode that is not known");
      }
    }
    x.bytes = bytes_of_type(words.back());
    x.is_signed = words.back()[0] == 's';
    if (static_cast<int>(x.operands.size()) != x.count + 1) throw Error("other operands than expected");
    const bool is_known = x.space == Space::param && x.operands[x.count].bytes == 0;
    x.execute = words[0] == "st" ? store : is_known ? load_parameter : load;
    for (Operand& operand : x.operands) {
      bind_number(operand, x.bytes);
      if (operand.kind == Operand::Kind::row && operand.bytes < x.bytes) throw Error("a register that is too small");
    }
  }

  // cp.async.ca.shared.global [to], [from], bytes {, given}. Only .ca copies less than 16 bytes.
  void decode_copy(Instruction& x, const std::vector<std::string>& words) {
    if (words[3] != "shared" || words[4] != "global" || x.operands.size() < 3)
      throw Error("an opcode that is not known");
    x.execute = copy_async;
    x.bytes = static_cast<int>(x.operands[2].number);
    if (x.bytes != 16 && (words[2] == "cg" || (x.bytes != 8 && x.bytes != 4))) throw Error("a copy of this size");
    if (x.operands.size() > 3) bind_number(x.operands[3], 4);
  }

  void decode_flow(Instruction& x, const std::string& opcode, const std::vector<std::string>& words) {
    // bar.sync is short for barrier.sync.aligned.
    const bool all = words[0] == "bar" || std::find(words.begin(), words.end(), "aligned") != words.end();
    if (words[0] == "bra") {
      const auto label = listing_.labels.find(x.operands.at(0).name);
      if (label == listing_.labels.end()) throw Error("a label that is not there");
      x.flow = Instruction::Flow::branch;
      x.target = label->second;
    } else if (opcode == "ret" || opcode == "exit") {
      x.flow = Instruction::Flow::exit;
    } else if (opcode == "bar.warp.sync") {
      x.flow = Instruction::Flow::warp_barrier;
      bind_number(x.operands.at(0), 4);
    } else if ((words[0] == "bar" || words[0] == "barrier") && (words.at(1) == "sync" || words.at(1) == "red") && all) {
      decode_barrier(x, words);
    } else if (words[0] == "membar" || words[0] == "fence" || words[0] == "griddepcontrol" || words[0] == "prefetch") {
      x.execute = do_nothing;  // all accesses are in order here, and one launch is over before the next
    } else {
      throw Error("an opcode that is not known");
    }
  }

  // Makes the number of the barrier the first operand; of bar.red, the predicate and the result are the last ones.
  void decode_barrier(Instruction& x, const std::vector<std::string>& words) {
    x.flow = Instruction::Flow::barrier;
    size_t first = 0, end = x.operands.size();
    if (words[1] == "red") {
      static const std::map<std::string, Poll> polls = {{"or", Poll::any}, {"and", Poll::all}, {"popc", Poll::number}};
      const auto poll =
          std::find_if(words.begin(), words.end(), [](const auto& word) { return polls.count(word) != 0; });
      if (poll == words.end() || end < 3) throw Error("an opcode that is not known");
      x.poll = polls.at(*poll);
      first = 1, end -= 1;
    }
    for (size_t i = first; i < end; ++i) {
      if (x.operands[i].kind != Operand::Kind::number) throw Error("a barrier whose number is not known ahead");
    }
    std::rotate(x.operands.begin(), x.operands.begin() + static_cast<int64_t>(first), x.operands.end());
  }

  const Listing& listing_;
  Kernel kernel_;
  std::map<std::pair<int, uint64_t>, Operand> numbers_;  // the rows of immediate values
};

// Reads the kernel whose name contains `name` from the text of a module.
inline Kernel read_kernel(const std::string& module, const std::string& name) {
  return Decoder::decode(Parser::parse(module, name));
}

}  // namespace ptx
