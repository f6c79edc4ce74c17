// card.h by CUDA.
#include <cuda_runtime_api.h>

#include <chrono>
#include <stdexcept>

#include "card.h"

namespace shufflenet::cuda::card {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream); }
  void wait() const { check(cudaStreamSynchronize(stream), "the work"); }
  cudaStream_t stream = nullptr;
};

}  // namespace

Memory::Memory(int64_t bytes) : bytes(bytes) {
  check(cudaMalloc(reinterpret_cast<void**>(&data), static_cast<size_t>(bytes)), "cudaMalloc");
}
Memory::~Memory() { cudaFree(data); }
void Memory::fill(int byte) { check(cudaMemset(data, byte, static_cast<size_t>(bytes)), "cudaMemset"); }
void Memory::write(int64_t at, const void* from, int64_t count) {
  check(cudaMemcpy(data + at, from, static_cast<size_t>(count), cudaMemcpyHostToDevice), "copy to the card");
}
std::vector<char> Memory::read() const {
  std::vector<char> copied(static_cast<size_t>(bytes));
  check(cudaMemcpy(copied.data(), data, copied.size(), cudaMemcpyDeviceToHost), "copy from the card");
  return copied;
}

int64_t l2_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  return bytes;
}

int64_t least_launches() { return 64; }

void copy(void* to, const void* from, int64_t bytes, void* stream) {
  check(cudaMemcpyAsync(
            to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
}

void run(const Work& work) {
  check(cudaDeviceSynchronize(), "what came before");  // what fills memory runs in another stream
  const Stream stream;
  work(stream.stream);
  stream.wait();
}

std::vector<double> time(const Work& work, int replays) {
  run(work);
  const Stream stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  work(stream.stream);
  check(cudaStreamEndCapture(stream.stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  // An idle card's clock is low, and rises within this time; between cases it stays up.
  static auto warm = std::chrono::milliseconds(400);
  const auto until = std::chrono::steady_clock::now() + warm;
  warm = std::chrono::milliseconds(3);
  do {
    check(cudaGraphLaunch(executable, stream.stream), "cudaGraphLaunch");
    stream.wait();
  } while (std::chrono::steady_clock::now() < until);
  std::vector<double> seconds;
  for (int i = 0; i < replays; ++i) {
    float milliseconds = 0;
    check(cudaEventRecord(begin, stream.stream), "cudaEventRecord");
    check(cudaGraphLaunch(executable, stream.stream), "cudaGraphLaunch");
    check(cudaEventRecord(end, stream.stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "the work");
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    seconds.push_back(milliseconds * 1e-3);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return seconds;
}

}  // namespace shufflenet::cuda::card
