// What strip_kernel.cuh needs of the device beyond device.cuh: shared memory by 32-bit addresses, loads and stores of
// 8x8 matrices, and arithmetic on pairs of 16-bit numbers. tests/cuda/host_matrices.h holds the same names for the CPU.
//
// Addresses are bytes from the start of the block's shared memory on. Offsets that are known when compiling are
// template arguments, so that they become part of an instruction.
#pragma once

#include "device.cuh"

namespace shufflenet::cuda {

// Returns the address of the block's shared memory, which offsets are added to.
SHUFFLENET_DEVICE uint32_t shared_base() { return shared_address(shared_memory()); }

// A lane's part of a matrix operand, or four floats for two channels: what one load of 16 bytes brings.
struct alignas(16) Fragment {
  uint32_t words[4];
};
struct Vector4 {
  float values[4];
};
struct alignas(8) FloatPair {
  float low, high;
};
SHUFFLENET_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
SHUFFLENET_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Returns the number in a way that the compiler cannot see through.
SHUFFLENET_DEVICE int unknown(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Loads the fragment that lies kAhead fragments further on in memory that nobody writes while the kernel runs.
template <int kAhead = 0>
SHUFFLENET_DEVICE Fragment load_constant(const Fragment* from) {
  Fragment f;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(f.words[0]), "=r"(f.words[1]), "=r"(f.words[2]), "=r"(f.words[3])
               : "l"(from), "n"(kAhead * static_cast<int>(sizeof(Fragment))));
  return f;
}

// Loads a fragment's first word in the same way.
template <int kAhead>
SHUFFLENET_DEVICE uint32_t load_word(const Fragment* from) {
  uint32_t word;
  asm volatile("ld.global.nc.u32 %0, [%1+%2];"
               : "=r"(word)
               : "l"(from), "n"(kAhead * static_cast<int>(sizeof(Fragment))));
  return word;
}

// Loads four floats in the same way.
template <int kAhead>
SHUFFLENET_DEVICE Vector4 load_floats(const Fragment* from) {
  Vector4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4+%5];"
               : "=f"(v.values[0]), "=f"(v.values[1]), "=f"(v.values[2]), "=f"(v.values[3])
               : "l"(from), "n"(kAhead * static_cast<int>(sizeof(Fragment))));
  return v;
}

// Starts to copy 16 bytes, as copy_async does.
SHUFFLENET_DEVICE void copy_block_async(uint32_t to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

// Starts to copy 4, 8 or 16 bytes.
template <int kBytes>
SHUFFLENET_DEVICE void copy_unit_async(uint32_t to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
#endif
}
template <>
SHUFFLENET_DEVICE void copy_unit_async<16>(uint32_t to, const void* from) {
  copy_block_async(to, from);
}

SHUFFLENET_DEVICE void clear_block(uint32_t at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}
template <int kOffset = 0>
SHUFFLENET_DEVICE uint32_t load_pair(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(value) : "r"(at), "n"(kOffset) : "memory");
  return value;
}
template <int kOffset>
SHUFFLENET_DEVICE void store_pair(uint32_t at, uint32_t pair) {
  asm volatile("st.shared.u32 [%0+%1], %2;" ::"r"(at), "n"(kOffset), "r"(pair) : "memory");
}
template <int kOffset = 0>
SHUFFLENET_DEVICE uint16_t load_element(uint32_t at) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1+%2];" : "=h"(value) : "r"(at), "n"(kOffset) : "memory");
  return value;
}
SHUFFLENET_DEVICE void store_element(uint32_t at, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(value) : "memory");
}

SHUFFLENET_DEVICE void store_element(uint32_t at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}
template <int kOffset>
SHUFFLENET_DEVICE FloatPair load_float_pair(uint32_t at) {
  FloatPair pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2+%3];"
               : "=f"(pair.low), "=f"(pair.high)
               : "r"(at), "n"(kOffset)
               : "memory");
  return pair;
}
template <int kOffset>
SHUFFLENET_DEVICE void store_pair(uint32_t at, FloatPair pair) {
  asm volatile("st.shared.v2.f32 [%0+%1], {%2, %3};" ::"r"(at), "n"(kOffset), "f"(pair.low), "f"(pair.high) : "memory");
}
template <int kOffset>
SHUFFLENET_DEVICE Vector4 load_shared_floats(uint32_t at) {
  Vector4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4+%5];"
               : "=f"(v.values[0]), "=f"(v.values[1]), "=f"(v.values[2]), "=f"(v.values[3])
               : "r"(at), "n"(kOffset)
               : "memory");
  return v;
}
template <int kOffset>
SHUFFLENET_DEVICE void load_fragment(uint32_t (&words)[4], uint32_t at) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(at), "n"(kOffset)
               : "memory");
}
template <int kOffset>
SHUFFLENET_DEVICE void store_fragment(uint32_t at, const Fragment& f) {
  asm volatile("st.shared.v4.u32 [%0+%1], {%2, %3, %4, %5};" ::"r"(at), "n"(kOffset), "r"(f.words[0]), "r"(f.words[1]),
               "r"(f.words[2]), "r"(f.words[3])
               : "memory");
}

// Copies 4, 8 or 16 bytes of shared memory to global memory.
template <int kBytes>
SHUFFLENET_DEVICE void store_unit(void* to, uint32_t from) {
  if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = load_pair(from);
  } else {
    uint32_t words[4];
    if constexpr (kBytes == 8) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(from)
                   : "memory");
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                   "r"(words[3])
                   : "memory");
    }
  }
}

// Loads four 8x8 matrices, as load_matrices of device.cuh does, or two, whose rows lanes 0 to 15 pass the addresses of.
template <int kOffset>
SHUFFLENET_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row), "n"(kOffset)
               : "memory");
}
template <int kOffset>
SHUFFLENET_DEVICE void load_matrices(uint32_t (&to)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2+%3];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row), "n"(kOffset)
               : "memory");
}

// Loads four matrices and transposes each.
SHUFFLENET_DEVICE void load_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Returns the value that a lane of the warp passes.
SHUFFLENET_DEVICE uint32_t from_lane(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Stores as many matrices as there are registers, two or four, in the way that load_matrices loads them. Before sm_90
// there is no such instruction: a lane then stores its pair of each matrix, to the row whose address it asks for.
template <int kMatrices>
SHUFFLENET_DEVICE void store_matrices(uint32_t row, const uint32_t (&from)[kMatrices]) {
  static_assert(kMatrices == 2 || kMatrices == 4);
#if __CUDA_ARCH__ >= 900
  if constexpr (kMatrices == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(from[0]), "r"(from[1])
                 : "memory");
  }
#else
  const int lane = static_cast<int>(threadIdx.x & 31);
  SHUFFLENET_UNROLL
  for (int i = 0; i < kMatrices; ++i) {
    const uint32_t at = from_lane(row, 8 * i + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(from[i]) : "memory");
  }
#endif
}

// Returns whether the value is true in any lane of the warp.
SHUFFLENET_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }

// Sets d to the product of a and b, as multiply_matrices adds it to d.
SHUFFLENET_DEVICE void set_to_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, "
      "%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
#endif
}
SHUFFLENET_DEVICE void set_to_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
#endif
}
SHUFFLENET_DEVICE void set_to_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TFloat32) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
#endif
}
SHUFFLENET_DEVICE void multiply_matrices(float (&d)[4], const uint32_t (&a)[2], uint32_t b, BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
}

// ---- Pairs of neighbouring numbers: in 16 bits, the lower half of a register is the first ---------------------------

// Rounds two sums to a pair, behind a ReLU if kRelu. NaN stays NaN.
template <bool kRelu>
SHUFFLENET_DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t pair = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (kRelu) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
#endif
  return pair;
}
template <bool kRelu>
SHUFFLENET_DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t pair = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (kRelu) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
#endif
  return pair;
}

template <bool kRelu>
SHUFFLENET_DEVICE FloatPair pack(float low, float high, TFloat32) {
  return kRelu ? FloatPair{relu(low), relu(high)} : FloatPair{low, high};
}

// Returns relu(a + b), rounded once; 0x3c00 and 0x3f80 are 1: there is no addition with a ReLU.
SHUFFLENET_DEVICE uint32_t add_relu(uint32_t a, uint32_t b, Float16) {
  uint32_t sum = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3c003c00), "r"(b));
#endif
  return sum;
}
SHUFFLENET_DEVICE uint32_t add_relu(uint32_t a, uint32_t b, BFloat16) {
  uint32_t sum = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b));
#endif
  return sum;
}

// Writes an element to global memory.
SHUFFLENET_DEVICE void store_one(void* to, uint16_t value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
}

SHUFFLENET_DEVICE void store_one(void* to, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// Writes two pairs to global memory. The address is kOffset bytes less than meant.
template <int kOffset>
SHUFFLENET_DEVICE void store_pairs(void* to, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.u32 [%0+%1], {%2, %3};" ::"l"(to), "n"(kOffset), "r"(low), "r"(high) : "memory");
}

template <int kOffset>
SHUFFLENET_DEVICE void store_pairs(void* to, FloatPair low, FloatPair high) {
  asm volatile("st.global.v4.f32 [%0+%1], {%2, %3, %4, %5};" ::"l"(to), "n"(kOffset), "f"(low.low), "f"(low.high),
               "f"(high.low), "f"(high.high)
               : "memory");
}

// Add to one or two pairs those of shared memory at `at`, apply a ReLU, and round once. The address is kOffset bytes
// less than meant.
template <int kOffset, class T>
SHUFFLENET_DEVICE void add_relu_to(uint32_t at, uint32_t& pair, T) {
  pair = add_relu(pair, load_pair<kOffset>(at), T{});
}
template <int kOffset>
SHUFFLENET_DEVICE void add_relu_to(uint32_t at, FloatPair& pair, TFloat32) {
  const FloatPair x = load_float_pair<kOffset>(at);
  pair = {relu(pair.low + x.low), relu(pair.high + x.high)};
}
template <int kOffset, class T>
SHUFFLENET_DEVICE void add_relu_to(uint32_t at, uint32_t& low, uint32_t& high, T) {
  uint32_t x[2];
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2+%3];" : "=r"(x[0]), "=r"(x[1]) : "r"(at), "n"(kOffset) : "memory");
  low = add_relu(low, x[0], T{});
  high = add_relu(high, x[1], T{});
}

template <int kOffset>
SHUFFLENET_DEVICE void add_relu_to(uint32_t at, FloatPair& low, FloatPair& high, TFloat32) {
  const Vector4 x = load_shared_floats<kOffset>(at);
  low = {relu(low.low + x.values[0]), relu(low.high + x.values[1])};
  high = {relu(high.low + x.values[2]), relu(high.high + x.values[3])};
}

}  // namespace shufflenet::cuda
