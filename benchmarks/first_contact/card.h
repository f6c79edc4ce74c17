// What the driver asks of a card, besides launches (csrc/cuda/kernels.h): card_cuda.cpp asks CUDA, card_host.cpp has
// the kernels run on the CPU, for a rehearsal. Everything throws std::runtime_error where the card refuses.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace shufflenet::cuda::card {

// Work for a stream, which is a cudaStream_t.
using Work = std::function<void(void* stream)>;

// Bytes of the card's memory, 256-byte aligned.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  Memory(const Memory&) = delete;
  ~Memory();
  void fill(int byte);
  void write(int64_t at, const void* from, int64_t bytes);
  std::vector<char> read() const;

  int64_t bytes;
  char* data = nullptr;
};

int64_t l2_bytes();

// Returns how many launches a timed graph has at least: so many that what the graph itself takes does not count.
int64_t least_launches();

// Copies inside of the card's memory, in a stream.
void copy(void* to, const void* from, int64_t bytes, void* stream);

// Runs the work and waits for it.
void run(const Work& work);

// Returns the seconds of each of some replays of the work as one CUDA graph, behind others that warm the card up.
std::vector<double> time(const Work& work, int replays);

}  // namespace shufflenet::cuda::card
