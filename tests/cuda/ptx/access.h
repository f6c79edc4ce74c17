// Loads, stores and asynchronous copies: PTX ISA, "ld", "st", "cp.async".
#pragma once

#include <string>

#include "convert.h"
#include "warp.h"

namespace ptx {

inline Addresses addresses(Warp& warp, const Operand& operand, uint32_t lanes) {
  Addresses at = {};
  for_each_lane(lanes, [&](int lane) {
    at[lane] = operand.number + (operand.bytes ? warp.value(operand, lane) : 0);
    if (operand.bytes == 4) at[lane] &= 0xffffffffu;  // addresses of 32 bits wrap around
  });
  return at;
}

// Finds out what a generic access is to, which is the same for all lanes, and makes addresses of that space.
inline Space resolve(Space space, Addresses& at, uint32_t lanes) {
  if (space != Space::generic) return space;
  const auto space_of = [](uint64_t address) {
    return address >= kParameterWindow ? Space::param : address >= kSharedWindow ? Space::shared : Space::global;
  };
  space = space_of(at[__builtin_ctz(lanes)]);
  for_each_lane(lanes, [&](int lane) {
    if (space_of(at[lane]) != space) throw Error("generic addresses in several spaces");
    if (space == Space::param) at[lane] -= kParameterWindow;
    if (space == Space::shared) at[lane] -= kSharedWindow;
  });
  return space;
}

inline const unsigned char* read_parameter(const Warp& warp, uint64_t at, int bytes) {
  if (at + static_cast<uint64_t>(bytes) > static_cast<uint64_t>(warp.parameter_bytes)) {
    throw Error("a read behind the parameters, at " + std::to_string(at));
  }
  return warp.parameters + at;
}

template <class T>
uint64_t element_of(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return static_cast<uint64_t>(static_cast<int64_t>(value));
}
inline uint64_t element(const unsigned char* from, int bytes, bool is_signed) {
  switch (bytes) {
    case 1: return is_signed ? element_of<int8_t>(from) : element_of<uint8_t>(from);
    case 2: return is_signed ? element_of<int16_t>(from) : element_of<uint16_t>(from);
    case 4: return is_signed ? element_of<int32_t>(from) : element_of<uint32_t>(from);
    default: return element_of<uint64_t>(from);
  }
}

template <class T>
void fill(Warp& warp, const Operand& operand, uint32_t lanes, uint64_t value) {
  T values[kLanes];
  std::fill_n(values, kLanes, static_cast<T>(value));
  put(warp, operand, lanes, values);
}
// A load of parameters whose address no register is part of, and which is the same for all lanes.
inline void load_parameter(Warp& warp, const Instruction& x, uint32_t lanes) {
  const unsigned char* const from = read_parameter(warp, x.operands[x.count].number, x.bytes * x.count);
  for (int i = 0; i < x.count; ++i) {
    const uint64_t value = element(from + i * x.bytes, x.bytes, x.is_signed);
    switch (x.operands[i].bytes) {
      case 2: fill<uint16_t>(warp, x.operands[i], lanes, value); break;
      case 4: fill<uint32_t>(warp, x.operands[i], lanes, value); break;
      default: fill<uint64_t>(warp, x.operands[i], lanes, value);
    }
  }
}

// Operands: where the elements go, then the address.
inline void load(Warp& warp, const Instruction& x, uint32_t lanes) {
  Addresses at = addresses(warp, x.operands[x.count], lanes);
  const Space space = resolve(x.space, at, lanes);
  const int bytes = x.bytes * x.count;
  if (space == Space::shared) count_shared(*warp.count, at, bytes, lanes);
  if (space == Space::global) count_global(*warp.count, at, bytes, lanes);
  for_each_lane(lanes, [&](int lane) {
    const unsigned char* const from =
        space == Space::shared   ? warp.shared.read(warp.observer(lane), at[lane], bytes)
        : space == Space::global ? warp.global.read(at[lane], bytes, bytes)
                                 : read_parameter(warp, at[lane], bytes);
    for (int i = 0; i < x.count; ++i) {
      warp.set_value(x.operands[i], lane, element(from + i * x.bytes, x.bytes, x.is_signed));
    }
  });
}

// Operands: the address, then the elements.
inline void store(Warp& warp, const Instruction& x, uint32_t lanes) {
  Addresses at = addresses(warp, x.operands[0], lanes);
  const Space space = resolve(x.space, at, lanes);
  const int bytes = x.bytes * x.count;
  if (space == Space::param) throw Error("a write to the parameters");
  if (space == Space::shared) count_shared(*warp.count, at, bytes, lanes);
  if (space == Space::global) count_global(*warp.count, at, bytes, lanes);
  for_each_lane(lanes, [&](int lane) {
    unsigned char* const to = space == Space::shared ? warp.shared.write(warp.observer(lane), at[lane], bytes)
                                                     : warp.global.write(at[lane], bytes);
    for (int i = 0; i < x.count; ++i) {
      const uint64_t value = warp.value(x.operands[i + 1], lane);
      std::memcpy(to + i * x.bytes, &value, static_cast<size_t>(x.bytes));
    }
  });
}

// cp.async [to], [from], bytes {, given}: what is not given becomes zeros.
inline void copy_async(Warp& warp, const Instruction& x, uint32_t lanes) {
  const Addresses to = addresses(warp, x.operands[0], lanes), from = addresses(warp, x.operands[1], lanes);
  uint32_t reading = 0;
  for_each_lane(lanes, [&](int lane) {
    const int given = x.operands.size() > 3 ? static_cast<int>(warp.value(x.operands[3], lane)) : x.bytes;
    if (given < 0 || given > x.bytes) throw Error("a source of " + std::to_string(given) + " bytes");
    if (given) warp.global.read(from[lane], given, /*alignment=*/x.bytes);
    if (given) reading |= 1u << lane;
    warp.shared.start_copy(warp.observer(lane), to[lane], x.bytes);
    warp.copies[lane].open.push_back({to[lane], from[lane], x.bytes, given});
  });
  count_shared(*warp.count, to, x.bytes, lanes);
  count_global(*warp.count, from, x.bytes, reading);
}

inline void commit_copies(Warp& warp, const Instruction&, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    Copies& copies = warp.copies[lane];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  });
}

// A copy may land at any time from its beginning to its wait. Here it does so as late as it may, and what it fills
// cannot be read before: whoever does not wait is found out.
inline void wait_copies(Warp& warp, uint32_t lanes, uint64_t pending) {
  for_each_lane(lanes, [&](int lane) {
    auto& groups = warp.copies[lane].groups;
    while (groups.size() > pending) {
      for (const Copy& copy : groups.front()) {
        unsigned char* const to = warp.shared.write(warp.observer(lane), copy.to, copy.bytes);
        std::memcpy(to, reinterpret_cast<const void*>(copy.from), static_cast<size_t>(copy.given));
        std::memset(to + copy.given, 0, static_cast<size_t>(copy.bytes - copy.given));
      }
      groups.erase(groups.begin());
    }
  });
}
inline void wait_group(Warp& warp, const Instruction& x, uint32_t lanes) {
  wait_copies(warp, lanes, x.operands[0].number);
}
inline void wait_all(Warp& warp, const Instruction& x, uint32_t lanes) {
  commit_copies(warp, x, lanes);
  wait_copies(warp, lanes, 0);
}

}  // namespace ptx
