// What unit_kernel.cuh needs of the device: types, shared memory, barriers, asynchronous copies, warp-wide matrix
// instructions. tests/cuda/host_device.h holds the same names for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define SHUFFLENET_DEVICE __device__ __forceinline__
#define SHUFFLENET_UNROLL _Pragma("unroll")
// Marks loops that share work among threads. Unrolled, they would take the registers that accumulators need.
#define SHUFFLENET_NO_UNROLL _Pragma("unroll 1")

namespace shufflenet::cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// A float32 that tensor cores may round to TF32 (10 bits of mantissa) before they multiply. In memory and in sums it
// keeps full precision.
struct TFloat32 {
  float value;
};

SHUFFLENET_DEVICE float widen(float value) { return value; }
SHUFFLENET_DEVICE double widen(double value) { return value; }
SHUFFLENET_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
SHUFFLENET_DEVICE float widen(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
SHUFFLENET_DEVICE float widen(TFloat32 value) { return value.value; }
SHUFFLENET_DEVICE void narrow(float value, float& to) { to = value; }
SHUFFLENET_DEVICE void narrow(float value, TFloat32& to) { to.value = value; }
SHUFFLENET_DEVICE void narrow(double value, double& to) { to = value; }
SHUFFLENET_DEVICE void narrow(float value, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
SHUFFLENET_DEVICE void narrow(float value, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

SHUFFLENET_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
SHUFFLENET_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// Keeps NaN, as PyTorch does.
SHUFFLENET_DEVICE float relu(float value) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
  return value;
#else
  return value < 0 ? 0 : value;
#endif
}
SHUFFLENET_DEVICE double relu(double value) { return value < 0 ? 0 : value; }
SHUFFLENET_DEVICE float square_root(float value) { return sqrtf(value); }
SHUFFLENET_DEVICE double square_root(double value) { return sqrt(value); }

SHUFFLENET_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SHUFFLENET_DEVICE int64_t block_index() { return blockIdx.x; }
SHUFFLENET_DEVICE int64_t block_count() { return gridDim.x; }
SHUFFLENET_DEVICE void barrier() { __syncthreads(); }
SHUFFLENET_DEVICE void warp_barrier() { __syncwarp(); }

// A pointer into shared memory. On the CPU it is a class that checks every access.
template <class T>
using Shared = T*;

SHUFFLENET_DEVICE Shared<char> shared_memory() {
  extern __shared__ __align__(16) char shufflenet_shared[];
  return shufflenet_shared;
}
template <class T>
SHUFFLENET_DEVICE Shared<T> shared_at(Shared<char> memory, int64_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

// Casts a pointer into shared memory to elements of another type.
template <class U, class T>
SHUFFLENET_DEVICE Shared<U> shared_as(Shared<T> p) {
  return reinterpret_cast<U*>(p);
}

SHUFFLENET_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts to copy kBytes, or to zero them if not `valid`. The thread sees the result after wait_copies, other threads
// after a further barrier. Before sm_80 this is a plain copy.
template <int kBytes, class T>
SHUFFLENET_DEVICE void copy_async(Shared<T> to, const T* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(bytes)
        : "memory");
  }
#else
  struct alignas(kBytes) Block {
    T elements[kBytes / sizeof(T)];
  };
  *reinterpret_cast<Block*>(to) = valid ? *reinterpret_cast<const Block*>(from) : Block{};
#endif
}
SHUFFLENET_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of the thread's committed groups of copies are unfinished.
template <int kPending>
SHUFFLENET_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Loads four 8x8 matrices of 16-bit elements (ldmatrix). Lane 8 * i + j passes the address of row j of matrix i. Each
// lane receives, in register i, elements 2 * (lane % 4) and 2 * (lane % 4) + 1 of row lane / 4 of matrix i, or of its
// transpose if kTransposed. A row has 16 bytes, so of 32-bit elements a lane receives element lane % 4.
template <bool kTransposed, class T>
SHUFFLENET_DEVICE void load_matrices(uint32_t (&to)[4], Shared<const T> row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}
// Whether the architecture that is compiled for multiplies elements of type T on tensor cores.
template <class T>
inline constexpr bool kHasMma = false;
template <>
inline constexpr bool kHasMma<Float16> = true;  // sm_75, the oldest that is built, has it too, but only as m16n8k8
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
inline constexpr bool kHasMma<BFloat16> = true;
template <>
inline constexpr bool kHasMma<TFloat32> = true;
inline constexpr bool kHasMmaK16 = true;
#else
inline constexpr bool kHasMmaK16 = false;
#endif

SHUFFLENET_DEVICE uint32_t bits_of(TFloat32 value) { return __float_as_uint(value.value); }

// Prepares operands for multiply_matrices: rounds 32-bit ones to TF32, and leaves 16-bit ones as they are.
template <class T, int kRegisters>
SHUFFLENET_DEVICE void round_operands(uint32_t (&registers)[kRegisters]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 4) {
    SHUFFLENET_UNROLL
    for (uint32_t& bits : registers) asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(bits));
  }
#endif
}

// Adds the product of matrices a (by rows) and b (by columns) to d: mma.m16n8k16, or mma.m16n8k8 for 32-bit elements.
SHUFFLENET_DEVICE void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
SHUFFLENET_DEVICE void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
SHUFFLENET_DEVICE void multiply_matrices(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TFloat32) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// The same with half the depth (mma.m16n8k8 of 16-bit elements), which is all that sm_75 has.
SHUFFLENET_DEVICE void multiply_matrices(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Float16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

}  // namespace shufflenet::cuda
