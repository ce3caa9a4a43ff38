// SPDX-License-Identifier: Apache-2.0
// The instructions of four warps together (wgmma), which sm_90a alone has: like device.cuh PTX under nvcc, elsewhere the
// emulation.
//
// Both operands lie in shared memory, in rows of 128 bytes, 16 bytes of depth a chunk; chunk c of row r lies at place
// c ^ (r % 8) of its row (the swizzle of 128 bytes), and operands begin at multiples of 1024 bytes, plus 32 for each 16
// numbers of depth.
#pragma once

#ifndef __CUDACC__
#include "emulate/warpgroup.h"
#else

#include "device.cuh"

namespace gohsp::cuda {

// What a thread has written to shared memory, by copies or stores, tensor cores see after this fence and a barrier.
GOHSP_DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product of a group, and behind its last.
GOHSP_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GOHSP_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The descriptor of an operand: where it begins, 1024 bytes from 8 rows to the next, the swizzle.
GOHSP_DEVICE uint64_t operand(uint32_t address) {
  return static_cast<uint64_t>((in_shared_window(address) & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

#define GOHSP_NAMES_32                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GOHSP_NAMES_64                                                                                          \
  GOHSP_NAMES_32                                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GOHSP_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GOHSP_SUMS_16(i) GOHSP_SUMS_4(i), GOHSP_SUMS_4(i + 4), GOHSP_SUMS_4(i + 8), GOHSP_SUMS_4(i + 12)
#define GOHSP_SUMS_32 GOHSP_SUMS_16(0), GOHSP_SUMS_16(16)
#define GOHSP_SUMS_64 GOHSP_SUMS_32, GOHSP_SUMS_16(32), GOHSP_SUMS_16(48)

// d += a b^T: 64 rows of a, N rows of b, a depth of 16. Warp w of the four has rows 16 w to 16 w + 15 of d, as N / 8
// fragments of mma. d must not be touched before wait_products.
template <class T, int N>
struct WarpgroupProduct;

template <int N>
GOHSP_DEVICE void wait_products(float* d);

#define GOHSP_WGMMA(T, type, N, names, sums, a_name, b_name, one)                                       \
  template <>                                                                                           \
  struct WarpgroupProduct<T, N> {                                                                       \
    GOHSP_DEVICE static void multiply(float* d, uint32_t a, uint32_t b) {                               \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " one ", 0; wgmma.mma_async.sync.aligned.m64n" #N \
                   "k16.f32." type "." type " {" names "}, " a_name ", " b_name ", add, 1, 1, 0, 0;}"   \
                   : sums                                                                               \
                   : "l"(operand(a)), "l"(operand(b)), "r"(1));                                         \
    }                                                                                                   \
  }
GOHSP_WGMMA(Half, "f16", 64, GOHSP_NAMES_32, GOHSP_SUMS_32, "%32", "%33", "%34");
GOHSP_WGMMA(Bfloat16, "bf16", 64, GOHSP_NAMES_32, GOHSP_SUMS_32, "%32", "%33", "%34");
GOHSP_WGMMA(Half, "f16", 128, GOHSP_NAMES_64, GOHSP_SUMS_64, "%64", "%65", "%66");
GOHSP_WGMMA(Bfloat16, "bf16", 128, GOHSP_NAMES_64, GOHSP_SUMS_64, "%64", "%65", "%66");

// Waits for all products. The sums are operands, so that the compiler reads none of them before.
template <>
GOHSP_DEVICE void wait_products<64>(float* d) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GOHSP_SUMS_32 : : "memory");
}

template <>
GOHSP_DEVICE void wait_products<128>(float* d) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GOHSP_SUMS_64 : : "memory");
}

#undef GOHSP_WGMMA
#undef GOHSP_SUMS_64
#undef GOHSP_SUMS_32
#undef GOHSP_SUMS_16
#undef GOHSP_SUMS_4
#undef GOHSP_NAMES_64
#undef GOHSP_NAMES_32

}  // namespace gohsp::cuda

#endif
