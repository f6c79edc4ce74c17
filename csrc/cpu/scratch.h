// Memory that threads keep from call to call.
#pragma once

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

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
    const int64_t unit = pages_ == Pages::huge && bytes >= kLeastHuge ? kHugePage : kScratchAlignment;
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

}  // namespace shufflenet::cpu
