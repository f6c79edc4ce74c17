// Memory that threads keep from call to call.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../kernels/table.h"

namespace shufflenet::cpu {

// Memory that a thread keeps, so that no call pays for fresh pages. It grows to the most that the thread has needed.
class Scratch {
 public:
  enum class Pages { small, huge };
  explicit Scratch(Pages pages = Pages::small) : pages_(pages) {}

  char* reserve(int64_t bytes) {
    if (bytes <= size_) return memory_.get();
    memory_.reset();
    size_ = 0;
    const int64_t unit = pages_ == Pages::huge && bytes >= kLeastHuge ? kHugePage : kMemoryAlignment;
    const int64_t rounded = ceil_div(bytes, unit) * unit;
    memory_.reset(static_cast<char*>(std::aligned_alloc(unit, rounded)));
    if (!memory_) {
      throw std::runtime_error("could not allocate " + std::to_string(rounded) + " bytes of scratch memory");
    }
#if defined(__linux__)
    if (unit == kHugePage) madvise(memory_.get(), rounded, MADV_HUGEPAGE);  // no more than a wish
#endif
    size_ = rounded;
    return memory_.get();
  }
  int64_t size() const { return size_; }

 private:
  // Images of many small pages share sets of the L2 cache by chance: in huge pages a network is 5 % faster at batch 1.
  static constexpr int64_t kHugePage = 2 * 1024 * 1024;
  static constexpr int64_t kLeastHuge = kHugePage / 8;  // below it most of a page would be waste

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  Pages pages_;
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

struct CallChunks {
  struct Position {
    size_t chunk = 0;
    int64_t byte = 0;
  };
  std::vector<Scratch> memory;
  Position next;  // that is free
};
inline thread_local CallChunks call_chunks;

// Memory for what a call sets up, from chunks that the thread keeps, each as large as its first use ever was. Nothing
// in it is destroyed; it is free again with the end of the CallMemory that it was taken from, which is one thread's. Of
// several in one thread, the last one made may take, and is the first to end.
class CallMemory {
 public:
  CallMemory() : chunks_(call_chunks), begin_(chunks_.next) {}
  CallMemory(const CallMemory&) = delete;
  ~CallMemory() { chunks_.next = begin_; }

  template <class U>
  U* array(int64_t n) {
    static_assert(std::is_trivially_destructible_v<U> && alignof(U) <= kMemoryAlignment);
    return reinterpret_cast<U*>(take(n * static_cast<int64_t>(sizeof(U))));
  }
  template <class U, class... Arguments>
  const U* make(Arguments&&... arguments) {
    return new (array<U>(1)) U(std::forward<Arguments>(arguments)...);
  }

 private:
  static constexpr int64_t kChunkBytes = 64 * 1024;

  char* take(int64_t bytes) {
    CallChunks::Position& next = chunks_.next;
    if (next.byte > 0 && chunks_.memory[next.chunk].size() < next.byte + bytes) next = {next.chunk + 1, 0};
    if (next.chunk == chunks_.memory.size()) chunks_.memory.emplace_back();
    // Grows a chunk only where none of it is in use.
    char* const taken = chunks_.memory[next.chunk].reserve(std::max(kChunkBytes, next.byte + bytes)) + next.byte;
    next.byte += ceil_div(bytes, kMemoryAlignment) * kMemoryAlignment;
    return taken;
  }

  CallChunks& chunks_;
  CallChunks::Position begin_;
};

}  // namespace shufflenet::cpu
