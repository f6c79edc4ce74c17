// In the place of csrc/cpu/isa/dispatch.cpp: there are no ISAs, so that plain_pairs.cpp alone is fuzzed, which takes
// seconds to build.
#include "../../../csrc/cpu/isa/isa.h"

namespace shufflenet::cpu {

extern const Isa& plain_pairs;

std::vector<std::string> usable_isas() { return {}; }
const Isa& isa() { return plain_pairs; }
void select_isa(const std::string&) {}

}  // namespace shufflenet::cpu
