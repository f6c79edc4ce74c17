// What a test's kernel reads and writes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace shufflenet::cuda {

struct Allocation {
  const void* data;
  int64_t bytes;
};
// All buffers that there are now.
inline std::vector<Allocation>& allocations() {
  static std::vector<Allocation> all;
  return all;
}

// Exactly as many elements as asked for, `shift` elements behind an aligned address. AddressSanitizer guards both ends
// where shift is 0, else the end.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n, int64_t shift = 0) : size(n) {
    if (posix_memalign(&memory, 256, (n + shift) * sizeof(T))) std::abort();
    std::memset(memory, 0xff, (n + shift) * sizeof(T));
    data = static_cast<T*>(memory) + shift;
    allocations().push_back({data, n * static_cast<int64_t>(sizeof(T))});
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    auto& all = allocations();
    all.erase(std::find_if(all.begin(), all.end(), [this](const Allocation& one) { return one.data == data; }));
    std::free(memory);
  }
  int64_t size;
  void* memory = nullptr;
  T* data;
};

}  // namespace shufflenet::cuda
