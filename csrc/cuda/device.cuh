// SPDX-License-Identifier: Apache-2.0
// What the kernels are written in: thin names for the instructions they use. Under nvcc they are PTX, here; under any
// other compiler they are the host's emulation (emulate/device.h), which the tests run the same kernels on.
//
// Shared memory is addressed in bytes from the beginning of the block's, so that the emulation sees every access.
#pragma once

#ifndef __CUDACC__
#include "emulate/device.h"
#else

#include <cstdint>

#include "types.h"

#define GOHSP_DEVICE __device__ __forceinline__
#define GOHSP_BOTH __host__ __device__ __forceinline__
#define GOHSP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define GOHSP_UNROLL _Pragma("unroll")
#define GOHSP_UNROLL_BY(n) GOHSP_PRAGMA(unroll n)
#define GOHSP_PRAGMA(x) _Pragma(#x)

namespace gohsp::cuda {

// Dynamic shared memory, whose size a launch sets. It begins where the swizzle of 128 bytes repeats.
extern __shared__ __align__(1024) Bytes16 shared_memory[];

GOHSP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GOHSP_DEVICE uint32_t block_index() { return blockIdx.x; }

// --- launches that overlap (programmatic dependent launch, from sm_90 on) ---------------------------------------------
// The next launch of the stream may begin once every block of this one has said so or has ended. It says nothing about
// what this one has written.
GOHSP_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before has ended and what it wrote can be seen. Every thread of every block calls it before it
// reads what an earlier launch of the call writes, and before it writes anything: since all of them do, the launch
// before has itself waited for its own predecessor, and so on down to the first.
GOHSP_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of the block, and of the warp; each also orders what its threads wrote to shared memory.
GOHSP_DEVICE void barrier() { __syncthreads(); }
GOHSP_DEVICE void warp_barrier() { __syncwarp(); }

// --- numbers ---------------------------------------------------------------------------------------------------------
GOHSP_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GOHSP_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

GOHSP_DEVICE float to_float(float x) { return x; }
GOHSP_DEVICE float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

GOHSP_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers in a register, the first in the low half.
template <class T>
GOHSP_DEVICE uint32_t pack2(float low, float high);

template <>
GOHSP_DEVICE uint32_t pack2<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
GOHSP_DEVICE uint32_t pack2<Bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <class T>
GOHSP_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack2<T>(x, 0.0f))};
}

template <>
GOHSP_DEVICE float from_float<float>(float x) {
  return x;
}

// The nearest number of tf32. Without it the tensor core would cut the lowest 13 bits off, which is biased.
GOHSP_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// One instruction, good to 2 units in the last place; subnormal results become 0, which is what a softmax wants.
GOHSP_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GOHSP_DEVICE float exp_fast(float x) { return __expf(x); }
GOHSP_DEVICE float rsqrt_fast(float x) { return rsqrtf(x); }

// One instruction, good to a unit in the last place.
GOHSP_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GOHSP_DEVICE float erf_exact(float x) { return erff(x); }
GOHSP_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
GOHSP_DEVICE float minus_infinity() { return float_of(0xff800000u); }

// --- memory ----------------------------------------------------------------------------------------------------------
template <class T>
GOHSP_DEVICE T load_global(const T* pointer) {
  return *pointer;
}

template <class T>
GOHSP_DEVICE void store_global(T* pointer, T value) {
  *pointer = value;
}

template <class T>
GOHSP_DEVICE T* shared_pointer(uint32_t address) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + address);
}

template <class T>
GOHSP_DEVICE T load_shared(uint32_t address) {
  return *shared_pointer<T>(address);
}

template <class T>
GOHSP_DEVICE void store_shared(uint32_t address, T value) {
  *shared_pointer<T>(address) = value;
}

// The address that instructions on shared memory take, which is not that of a pointer.
GOHSP_DEVICE uint32_t in_shared_window(uint32_t address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + address;
}

// 16 bytes from a tensor, or zeros; begins now, has happened after wait_copies.
GOHSP_DEVICE void copy_async(uint32_t address, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(in_shared_window(address)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of copies, which may be empty.
GOHSP_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for the last `groups_left` commits.
template <int groups_left>
GOHSP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// --- a whole warp ----------------------------------------------------------------------------------------------------
GOHSP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Four matrices of 8 rows of 16 bytes; lanes 8 m to 8 m + 7 have the addresses of the rows of matrix m.
GOHSP_DEVICE void load_matrices(uint32_t to[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(in_shared_window(address))
               : "memory");
}

// The same, each matrix transposed: for an operand that lies in memory by rows and is wanted by columns.
GOHSP_DEVICE void load_matrices_transposed(uint32_t to[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(in_shared_window(address))
               : "memory");
}

// d += a b with a [16, 16] (tf32: [16, 8]), b [16, 8] (tf32: [8, 8]) and d [16, 8] in float32.
#define GOHSP_MMA(name, shape)                                                                       \
  GOHSP_DEVICE void name(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {                \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
GOHSP_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
GOHSP_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
GOHSP_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef GOHSP_MMA

}  // namespace gohsp::cuda

#endif
