// Memory that notices what a kernel must not do to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "value.h"

namespace ptx {

// Global memory: buffers of the host, at their own addresses. Any access beside them, or against what they are for, is
// an error.
class GlobalMemory {
 public:
  enum class Use { read, write };

  void add(const std::string& name, const void* data, int64_t bytes, Use use) {
    const auto begin = reinterpret_cast<uint64_t>(data);
    buffers_.push_back({name, begin, begin + static_cast<uint64_t>(bytes), use});
  }

  const unsigned char* read(uint64_t at, int bytes, int alignment) {
    check(at, bytes, alignment, Use::read);
    return reinterpret_cast<const unsigned char*>(at);
  }
  unsigned char* write(uint64_t at, int bytes) {
    check(at, bytes, bytes, Use::write);
    return reinterpret_cast<unsigned char*>(at);
  }

 private:
  struct Buffer {
    std::string name;
    uint64_t begin, end;
    Use use;
    bool holds(uint64_t at, int bytes) const { return at >= begin && at + static_cast<uint64_t>(bytes) <= end; }
  };

  void check(uint64_t at, int bytes, int alignment, Use use) {
    if (at % static_cast<uint64_t>(alignment) != 0) {
      throw Error("global memory at " + described(at) + ", not aligned to " + std::to_string(alignment));
    }
    if (last_ < buffers_.size() && buffers_[last_].use == use && buffers_[last_].holds(at, bytes)) return;
    for (last_ = 0; last_ < buffers_.size(); ++last_) {
      if (buffers_[last_].use == use && buffers_[last_].holds(at, bytes)) return;
    }
    throw Error(std::string("global memory at ") + described(at) + ": " + std::to_string(bytes) +
                " bytes that may not be " + (use == Use::read ? "read" : "written"));
  }

  // Says where an address is, from the beginning of the buffer that is nearest to it.
  std::string described(uint64_t at) const {
    const Buffer* nearest = nullptr;
    const auto distance = [at](const Buffer& b) {
      return at < b.begin ? b.begin - at : at < b.end ? 0 : at - b.end + 1;
    };
    for (const Buffer& buffer : buffers_) {
      if (!nearest || distance(buffer) < distance(*nearest)) nearest = &buffer;
    }
    if (!nearest) return std::to_string(at);
    return nearest->name + " (" + std::to_string(nearest->end - nearest->begin) + " bytes) + " +
           std::to_string(static_cast<int64_t>(at - nearest->begin));
  }

  std::vector<Buffer> buffers_;
  size_t last_ = 0;  // the buffer of the last access
};

// Who accesses shared memory and when. Time is counted in barriers. What a warp did is ordered before this access if it
// was done before the time in `seen`: barriers pass that on, those of the block for all warps, those of a warp for
// itself (PTX ISA, "Memory Consistency Model": without one, two accesses of a byte race if one of them writes it).
struct Observer {
  int thread;
  uint32_t now;
  const uint32_t* seen;  // by warp
};

// A block's shared memory. Errors are accesses outside of it or not aligned, reads of what was never written or of what
// an asynchronous copy is still filling, and races.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : data_(static_cast<size_t>(bytes)), granules_(data_.size() / kGranule) {
    reset();
  }

  void reset() {
    std::fill(data_.begin(), data_.end(), 0xff);
    std::fill(granules_.begin(), granules_.end(), Granule{});
  }

  const unsigned char* read(const Observer& by, uint64_t at, int bytes) {
    check(by, at, bytes);
    for (uint64_t i = at / kGranule; i < (at + bytes) / kGranule; ++i) note_read(by, i);
    return &data_[at];
  }
  unsigned char* write(const Observer& by, uint64_t at, int bytes) {
    check(by, at, bytes);
    for (uint64_t i = at / kGranule; i < (at + bytes) / kGranule; ++i) note_write(by, i);
    return &data_[at];
  }
  // Marks what an asynchronous copy will fill; that it lands is a write.
  void start_copy(const Observer& by, uint64_t at, int bytes) {
    write(by, at, bytes);
    for (uint64_t i = at / kGranule; i < (at + bytes) / kGranule; ++i) granules_[i].filling = true;
  }

 private:
  static constexpr uint64_t kGranule = 2;  // bytes that are followed as one: the smallest element that kernels put here
  static constexpr int kNobody = -1, kSeveral = -2;
  struct Granule {
    int16_t writer = kNobody, reader = kNobody;  // threads
    uint32_t written = 0, read = 0;              // when
    uint32_t reading_warps = 0;
    bool filling = false;
  };

  void check(const Observer& by, uint64_t at, int bytes) const {
    if (at + static_cast<uint64_t>(bytes) > data_.size()) {
      throw Error(who(by) + "shared memory at " + std::to_string(static_cast<int32_t>(at)) + ", " +
                  std::to_string(bytes) + " bytes, is outside of the block's " + std::to_string(data_.size()));
    }
    if (at % static_cast<uint64_t>(bytes) != 0) {
      throw Error(who(by) + "shared memory at " + std::to_string(at) + ", not aligned to " + std::to_string(bytes));
    }
    if (bytes == 1) throw Error("an access to a single byte of shared memory, which this machine does not follow");
  }

  void note_read(const Observer& by, uint64_t i) {
    Granule& granule = granules_[i];
    if (granule.filling)
      throw Error(who(by) + "read of shared " + where(i) + ", which an asynchronous copy is filling");
    if (granule.writer == kNobody) throw Error(who(by) + "read of shared " + where(i) + ", which was never written");
    if (granule.writer != by.thread && granule.written >= by.seen[granule.writer / 32]) {
      throw Error(who(by) + "race: read of shared " + where(i) + ", written by thread " +
                  std::to_string(granule.writer) + " with no barrier between");
    }
    const uint32_t warp = 1u << by.thread / 32;
    if (granule.reader == by.thread || reads_are_seen(granule, by)) {
      granule.reader = static_cast<int16_t>(by.thread);
      granule.reading_warps = warp;
    } else {
      granule.reader = kSeveral;
      granule.reading_warps |= warp;
    }
    granule.read = by.now;
  }

  void note_write(const Observer& by, uint64_t i) {
    Granule& granule = granules_[i];
    if (granule.writer != kNobody && granule.writer != by.thread && granule.written >= by.seen[granule.writer / 32]) {
      throw Error(who(by) + "race: write of shared " + where(i) + ", written by thread " +
                  std::to_string(granule.writer) + " with no barrier between");
    }
    if (granule.reader != by.thread && !reads_are_seen(granule, by)) {
      throw Error(who(by) + "race: write of shared " + where(i) + ", read by other threads with no barrier between");
    }
    granule = {static_cast<int16_t>(by.thread), kNobody, by.now, 0, 0, false};
  }

  static bool reads_are_seen(const Granule& granule, const Observer& by) {
    for (uint32_t warps = granule.reading_warps; warps; warps &= warps - 1) {
      if (granule.read >= by.seen[__builtin_ctz(warps)]) return false;
    }
    return true;
  }

  static std::string who(const Observer& by) { return "thread " + std::to_string(by.thread) + ": "; }
  static std::string where(uint64_t i) { return "byte " + std::to_string(i * kGranule); }

  std::vector<unsigned char> data_;
  std::vector<Granule> granules_;
};

}  // namespace ptx
