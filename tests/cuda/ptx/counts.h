// What is counted while a kernel runs: what a profiler would show, as far as it depends on the program alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "instruction.h"

namespace ptx {

// Counts all executions of an instruction by a warp, whatever lanes took part.
struct Count {
  int64_t executed = 0;
  // Shared memory serves a warp's access of 4 bytes a lane at once, of 8 for half of the lanes at once, of 16 for a
  // quarter. Each such part is an access; it takes more than one wavefront where lanes want different words of a bank.
  int64_t shared_accesses = 0, shared_wavefronts = 0;
  // Global memory moves whole sectors of 32 bytes.
  int64_t global_bytes = 0, global_sectors = 0;

  void add(const Count& other) {
    executed += other.executed;
    shared_accesses += other.shared_accesses;
    shared_wavefronts += other.shared_wavefronts;
    global_bytes += other.global_bytes;
    global_sectors += other.global_sectors;
  }
};

// The address that each lane of an access gives.
using Addresses = std::array<uint64_t, kLanes>;

// Counts an access of `bytes` bytes a lane to shared memory, which has 32 banks of words of 4 bytes.
inline void count_shared(Count& count, const Addresses& at, int bytes, uint32_t lanes) {
  const int words = std::max(1, bytes / 4), lanes_at_once = kLanes / words;
  for (int first = 0; first < kLanes; first += lanes_at_once) {
    std::array<std::array<uint64_t, kLanes>, 32> wanted;  // the different words of each bank
    std::array<int, 32> number = {};
    int most = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int i = 0; i < words; ++i) {
        const uint64_t word = at[lane] / 4 + i;
        auto& bank = wanted[word % 32];
        int& size = number[word % 32];
        if (std::find(bank.begin(), bank.begin() + size, word) != bank.begin() + size) continue;
        bank[size++] = word;
        most = std::max(most, size);
      }
    }
    if (most == 0) continue;
    ++count.shared_accesses;
    count.shared_wavefronts += most;
  }
}

// Counts an access of `bytes` bytes a lane to global memory.
inline void count_global(Count& count, const Addresses& at, int bytes, uint32_t lanes) {
  constexpr uint64_t kSector = 32;
  std::array<uint64_t, kLanes> sectors;  // an access is aligned to its size, and so lies in one sector
  int size = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    count.global_bytes += bytes;
    const uint64_t sector = at[lane] / kSector;
    if (size == 0 || sectors[size - 1] != sector) sectors[size++] = sector;
  }
  std::sort(sectors.begin(), sectors.begin() + size);
  count.global_sectors += std::unique(sectors.begin(), sectors.begin() + size) - sectors.begin();
}

}  // namespace ptx
