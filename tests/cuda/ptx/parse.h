// Reads PTX (PTX ISA, "Syntax" and "State Spaces, Types, and Variables"): finds a kernel in a module, and makes
// statements of its text, in which names of registers and variables are resolved already.
#pragma once

#include <algorithm>
#include <cctype>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "instruction.h"

namespace ptx {

struct Statement {
  int guard = -1;
  bool guard_negated = false;
  int line = 0;
  std::string opcode, text;
  std::vector<std::vector<Operand>> operands;  // one has several parts where it stands in braces
};

// A kernel as it is written. What becomes of its opcodes is decode.h's.
struct Listing {
  std::string name;
  std::vector<Statement> statements;
  std::map<std::string, int> labels;     // the statement behind each
  std::vector<unsigned char> registers;  // poisoned rows, one a register
  std::map<Special, uint32_t> specials;
  int predicates = 0;
  int64_t parameter_bytes = 0, static_shared_bytes = 0;
  int max_threads = 0;  // .maxntid or .reqntid; 0 where there is neither
};

// Appends a register to those of a warp, and returns where it begins. Rows are aligned for vector instructions.
inline uint32_t add_row(std::vector<unsigned char>& registers, int bytes) {
  const auto at = static_cast<uint32_t>(registers.size());
  registers.resize(at + static_cast<size_t>(bytes) * kLanes);
  // A NaN in every format: 0x7fff as 16 bits, 0x7fff7fff as 32, 0x7fff7fff7fff7fff as 64.
  for (size_t i = at; i < registers.size(); ++i) registers[i] = i % 2 ? 0x7f : 0xff;
  return at;
}

inline std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
  return parts;
}

// The bytes of a type, such as .b32 or .f16x2.
inline int bytes_of_type(const std::string& type) {
  static const std::map<std::string, int> bytes = {
      {"b8", 1},  {"s8", 1},  {"u8", 1},  {"b16", 2}, {"s16", 2}, {"u16", 2}, {"f16", 2}, {"bf16", 2},  {"b32", 4},
      {"s32", 4}, {"u32", 4}, {"f32", 4}, {"b64", 8}, {"s64", 8}, {"u64", 8}, {"f64", 8}, {"f16x2", 4}, {"bf16x2", 4}};
  const auto found = bytes.find(type[0] == '.' ? type.substr(1) : type);
  if (found == bytes.end()) throw Error("a type that is not known: " + type);
  return found->second;
}

class Parser {
 public:
  // Reads the kernel whose name contains `name`.
  static Listing parse(const std::string& module, const std::string& name) { return Parser().read(module, name); }

 private:
  // Variables and registers by name. Braces open a scope, as inline assembly uses them for registers of its own.
  using Scope = std::map<std::string, Operand>;
  // Stands for a register that no instruction has named yet: nvcc declares many more than it uses.
  static constexpr uint32_t kNoRow = 0xffffffffu;

  Listing read(const std::string& module, const std::string& name) {
    const std::string text = without_comments(module);
    std::string outside;  // what is declared for all kernels
    size_t at = 0, body_begin = 0, body_end = 0;
    for (size_t entry; (entry = text.find(".entry", at)) != std::string::npos;) {
      outside += text.substr(at, entry - at);
      const size_t open = text.find('(', entry), close = text.find(')', open), brace = text.find('{', close);
      const size_t end = matching_brace(text, brace);
      const std::string found = trimmed(text.substr(entry + 6, open - entry - 6));
      if (found.find(name) != std::string::npos) {
        if (body_end) throw Error("several kernels whose names contain " + name);
        listing_.name = found;
        body_begin = brace + 1, body_end = end;
        scopes_.emplace_back();
        declare_parameters(text.substr(open + 1, close - open - 1));
        declare_limits(text.substr(close + 1, brace - close - 1));
      }
      at = end + 1;
    }
    if (!body_end) throw Error("no kernel whose name contains " + name);
    outside += text.substr(at);
    declare_shared(outside + text.substr(body_begin, body_end - body_begin));
    line_ = static_cast<int>(std::count(text.begin(), text.begin() + static_cast<int64_t>(body_begin), '\n')) + 1;
    read_body(text.substr(body_begin, body_end - body_begin));
    return std::move(listing_);
  }

  // Blanks comments out; lines keep their numbers.
  static std::string without_comments(std::string text) {
    for (size_t i = 0; i + 1 < text.size(); ++i) {
      const bool line = text.compare(i, 2, "//") == 0, block = text.compare(i, 2, "/*") == 0;
      if (!line && !block) continue;
      const size_t end = line ? text.find('\n', i) : text.find("*/", i) + 2;
      for (; i < std::min(end, text.size()); ++i) text[i] = text[i] == '\n' ? '\n' : ' ';
    }
    return text;
  }

  static size_t matching_brace(const std::string& text, size_t open) {
    int depth = 0;
    for (size_t i = open; i < text.size(); ++i) {
      if (text[i] == '{') ++depth;
      if (text[i] == '}' && --depth == 0) return i;
    }
    throw Error("a brace that is never closed");
  }

  // Declares the parameters: a name is its offset in the parameter block.
  void declare_parameters(const std::string& text) {
    for (const std::string& parameter : split(text, ',')) {
      if (trimmed(parameter).empty()) continue;
      const auto [name, bytes, alignment] = variable(parameter.substr(parameter.find(".param") + 6));
      declare_variable(name, bytes, alignment, listing_.parameter_bytes);
    }
  }

  void declare_limits(const std::string& text) {
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      if (word == ".maxntid" || word == ".reqntid") words >> listing_.max_threads;
    }
  }

  // Declares variables in shared memory. Memory that a launch asks for is behind all others.
  void declare_shared(const std::string& text) {
    std::vector<std::string> dynamic;
    for (size_t at = 0; (at = text.find(".shared .", at)) != std::string::npos; at += 8) {
      const std::string declaration = text.substr(at + 7, text.find(';', at) - at - 7);
      const auto [name, bytes, alignment] = variable(declaration);
      if (bytes == 0) {
        dynamic.push_back(name);
      } else {
        declare_variable(name, bytes, alignment, listing_.static_shared_bytes);
      }
    }
    for (const std::string& name : dynamic) declare_variable(name, 0, 128, listing_.static_shared_bytes);
  }

  void declare_variable(const std::string& name, int64_t bytes, int64_t alignment, int64_t& end) {
    end = (end + alignment - 1) / alignment * alignment;
    Operand operand;
    operand.kind = Operand::Kind::number;
    operand.number = static_cast<uint64_t>(end);
    scopes_.front()[name] = operand;
    end += bytes;
  }

  struct Variable {
    std::string name;
    int64_t bytes, alignment;
  };
  // Reads what follows a state space: `.align 8 .b8 name[560]` or `.u64 name`. Without a size in the brackets, 0 bytes.
  static Variable variable(const std::string& text) {
    std::istringstream words(text);
    Variable variable = {"", 0, 0};
    int bytes = 0;
    for (std::string word; words >> word;) {
      if (word == ".align") {
        words >> variable.alignment;
      } else if (word[0] == '.') {
        bytes = bytes_of_type(word);
      } else {
        const size_t bracket = word.find('[');
        variable.name = word.substr(0, bracket);
        variable.bytes = bytes;
        if (bracket != std::string::npos) {
          variable.bytes *= word[bracket + 1] == ']' ? 0 : std::stoll(word.substr(bracket + 1));
        }
      }
    }
    if (variable.alignment == 0) variable.alignment = bytes;
    return variable;
  }

  void read_body(const std::string& text) {
    std::string statement;
    int depth = 0;  // of braces inside a statement, around the parts of an operand
    for (size_t i = 0; i < text.size(); ++i) {
      const char c = text[i];
      if (c == '\n') ++line_;
      const bool starts = statement.empty();  // blanks before a statement are not kept
      if (starts && c == '{') {
        scopes_.emplace_back();
      } else if (starts && c == '}') {
        scopes_.pop_back();
      } else if (c == ';' && depth == 0) {
        read_statement(trimmed(statement));
        statement.clear();
      } else if (c == ':' && is_label(statement)) {
        listing_.labels[trimmed(statement)] = static_cast<int>(listing_.statements.size());
        statement.clear();
      } else {
        depth += (c == '{') - (c == '}');
        if (!starts || !std::isspace(static_cast<unsigned char>(c))) statement += c;
      }
    }
  }
  static bool is_label(const std::string& text) {
    return std::all_of(
        text.begin(), text.end(), [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '$'; });
  }

  void read_statement(const std::string& text) {
    if (text.empty()) return;
    if (text[0] == '.') {
      if (text.rfind(".reg", 0) == 0) declare_registers(text.substr(4));
      if (text.rfind(".local", 0) == 0) throw Error("local memory, which this machine has not: " + text);
      return;  // .pragma, .loc: nothing that is executed. Variables of .shared are declared already.
    }
    Statement statement;
    statement.text = text;
    statement.line = line_;
    std::string rest = text;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t");
      const Operand guard = operand(rest.substr(1, end - 1));
      if (guard.kind != Operand::Kind::predicate) throw Error("a guard that is no predicate: " + text);
      statement.guard = static_cast<int>(guard.at);
      statement.guard_negated = guard.negated;
      rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
    statement.opcode = rest.substr(0, end);
    for (const std::string& part : operand_texts(rest.substr(end))) {
      statement.operands.emplace_back();
      if (part[0] == '{') {
        for (const std::string& inner : split(part.substr(1, part.size() - 2), ',')) {
          statement.operands.back().push_back(operand(trimmed(inner)));
        }
      } else {
        for (const std::string& one : split(part, '|')) statement.operands.back().push_back(operand(trimmed(one)));
      }
    }
    listing_.statements.push_back(statement);
  }

  // Cuts at the commas that are not inside of braces or brackets.
  static std::vector<std::string> operand_texts(const std::string& text) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (char c : text) {
      depth += (c == '{' || c == '[') - (c == '}' || c == ']');
      if (c == ',' && depth == 0) {
        parts.emplace_back();
      } else {
        parts.back() += c;
      }
    }
    for (std::string& part : parts) part = trimmed(part);
    if (parts.back().empty()) parts.pop_back();
    return parts;
  }

  // `.b32 %r<100>` declares %r0 to %r99; `.b32 a, b` two.
  void declare_registers(const std::string& text) {
    std::istringstream words(text);
    std::string type, names;
    words >> type;
    std::getline(words, names);
    for (const std::string& part : split(names, ',')) {
      const std::string name = trimmed(part);
      const size_t bracket = name.find('<');
      if (bracket == std::string::npos) {
        declare_register(name, type);
      } else {
        const int count = std::stoi(name.substr(bracket + 1));
        for (int i = 0; i < count; ++i) declare_register(name.substr(0, bracket) + std::to_string(i), type);
      }
    }
  }
  void declare_register(const std::string& name, const std::string& type) {
    Operand& operand = scopes_.back()[name];
    if (type == ".pred") {
      operand.kind = Operand::Kind::predicate;
      operand.at = static_cast<uint32_t>(listing_.predicates++);
    } else {
      operand.kind = Operand::Kind::row;
      operand.bytes = static_cast<uint8_t>(bytes_of_type(type));
      operand.at = kNoRow;
    }
  }

  Operand operand(const std::string& text) {
    Operand found;
    if (text == "_") return found;
    if (text[0] == '!') {
      found = operand(text.substr(1));
      found.negated = true;
      return found;
    }
    if (text[0] == '[') return address(trimmed(text.substr(1, text.size() - 2)));
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      found.kind = Operand::Kind::number;
      found.number = number(text);
      return found;
    }
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto named = scope->find(text);
      if (named == scope->end()) continue;
      Operand& operand = named->second;
      if (operand.kind == Operand::Kind::row && operand.at == kNoRow) {
        operand.at = add_row(listing_.registers, operand.bytes);
      }
      return operand;
    }
    if (text[0] == '%') return special(text);
    found.kind = Operand::Kind::name;
    found.name = text;
    return found;
  }

  // A register or a variable, or both, and an offset: [%rd1+8], [name], [name+8], [%rd1+-8].
  Operand address(const std::string& text) {
    Operand found;
    for (const std::string& part : split(text, '+')) {
      const Operand one = operand(trimmed(part));
      if (one.kind == Operand::Kind::row && found.bytes == 0) {
        found.at = one.at;
        found.bytes = one.bytes;
      } else if (one.kind == Operand::Kind::number) {
        found.number += one.number;
      } else {
        throw Error("an address that is not understood: [" + text + "]");
      }
    }
    found.kind = Operand::Kind::address;
    return found;
  }

  // Integers as in C, with a U behind them or not; 0f and 0d with the bits of a float or a double.
  static uint64_t number(const std::string& text) {
    if (text[0] == '0' && text.size() > 2 && std::strchr("fFdD", text[1])) {
      return std::stoull(text.substr(2), nullptr, 16);
    }
    if (text[0] == '-') return static_cast<uint64_t>(std::stoll(text, nullptr, 0));
    return std::stoull(text, nullptr, 0);
  }

  Operand special(const std::string& name) {
    static const std::map<std::string, Special> specials = {
        {"%tid.x", Special::tid_x},       {"%tid.y", Special::tid_y},       {"%tid.z", Special::tid_z},
        {"%ntid.x", Special::ntid_x},     {"%ntid.y", Special::ntid_y},     {"%ntid.z", Special::ntid_z},
        {"%ctaid.x", Special::ctaid_x},   {"%ctaid.y", Special::ctaid_y},   {"%ctaid.z", Special::ctaid_z},
        {"%nctaid.x", Special::nctaid_x}, {"%nctaid.y", Special::nctaid_y}, {"%nctaid.z", Special::nctaid_z},
        {"%laneid", Special::laneid},     {"%warpid", Special::warpid}};
    const auto found = specials.find(name);
    if (found == specials.end()) throw Error("a register that is not known: " + name);
    Operand operand;
    operand.kind = Operand::Kind::row;
    operand.bytes = 4;
    const auto known = listing_.specials.find(found->second);
    operand.at = known != listing_.specials.end() ? known->second : add_row(listing_.registers, operand.bytes);
    listing_.specials[found->second] = operand.at;
    return operand;
  }

  Listing listing_;
  std::vector<Scope> scopes_;
  int line_ = 1;
};

}  // namespace ptx
