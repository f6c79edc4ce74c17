// Memory that threads keep from call to call.
#pragma once

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace shufflenet::cpu {

// Memory that a thread keeps, so that no call pays for fresh pages. It grows to the most that the thread has needed.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = ceil_div(bytes, kScratchAlignment) * kScratchAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kScratchAlignment, rounded)));
      if (!memory_) {
        throw std::runtime_error("could not allocate " + std::to_string(rounded) + " bytes of scratch memory");
      }
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace shufflenet::cpu
