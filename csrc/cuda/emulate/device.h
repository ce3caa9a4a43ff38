// SPDX-License-Identifier: Apache-2.0
// The primitives of device.cuh on the host. Fragments of matrices lie in the lanes of a warp as the PTX manual has them
// ("Matrix Fragments for mma.m16n8k16", "... for mma.m16n8k8", "ldmatrix").
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "../types.h"
#include "block.h"

#define GOHSP_DEVICE inline
#define GOHSP_BOTH inline
#define GOHSP_KERNEL(threads, blocks) void
#define GOHSP_UNROLL
#define GOHSP_UNROLL_BY(n)

namespace gohsp::cuda {

using emulate::Block;
using emulate::Place;

inline int thread_index() { return Block::current()->thread(); }
inline uint32_t block_index() { return static_cast<uint32_t>(Block::current()->index); }

inline void let_next_launch_begin() {}
inline void wait_for_launch_before() { Block::current()->wait_for_launch_before(); }

inline void barrier(Place place = Place::here()) { Block::current()->barrier(place); }
inline void warp_barrier(Place place = Place::here()) { Block::current()->warp_barrier(place); }

// --- numbers ---------------------------------------------------------------------------------------------------------
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023,
                 sign = static_cast<uint32_t>(x.bits >> 15) << 31;
  if (exponent == 0) return float_of(sign | bits_of(std::ldexp(static_cast<float>(fraction), -24)));
  return float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

// Bits of x without the lowest `drop`, rounded to nearest even. A carry runs into the exponent, as it should.
inline uint32_t rounded_bits(uint32_t bits, int drop) {
  return (bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>(rounded_bits(bits_of(x), 16))};
}

template <>
inline Half from_float<Half>(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(size * 0x1p24f)))};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  return {static_cast<uint16_t>(sign | (rounded_bits(bits_of(size), 13) - (112 << 10)))};
}

template <class T>
uint32_t pack2(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

// Nearest number of tf32, ties away from zero (cvt.rna.tf32.f32).
inline uint32_t to_tf32(float x) { return x != x ? bits_of(x) : (bits_of(x) + 0x1000) & ~0x1fffu; }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float exp_fast(float x) { return std::exp(x); }
inline float rsqrt_fast(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float erf_exact(float x) { return std::erf(x); }
inline float max_of(float a, float b) { return std::fmax(a, b); }
inline float minus_infinity() { return -std::numeric_limits<float>::infinity(); }

// --- memory ----------------------------------------------------------------------------------------------------------
template <class T>
T load_global(const T* pointer, Place place = Place::here()) {
  Block::current()->check_global(pointer, sizeof(T), alignof(T), false, place);
  return *pointer;
}

template <class T>
void store_global(T* pointer, T value, Place place = Place::here()) {
  Block::current()->check_global(pointer, sizeof(T), alignof(T), true, place);
  *pointer = value;
}

template <class T>
T load_shared(uint32_t address, Place place = Place::here()) {
  T value;
  Block::current()->read(address, &value, sizeof(T), thread_index(), place);
  return value;
}

template <class T>
void store_shared(uint32_t address, T value, Place place = Place::here()) {
  Block::current()->write(address, &value, sizeof(T), thread_index(), place);
}

inline void copy_async(uint32_t address, const void* source, bool valid, Place place = Place::here()) {
  Block::current()->copy_async(address, source, 16, valid, place);
}

inline void commit() { Block::current()->commit(); }

template <int groups_left>
void wait_copies() {
  Block::current()->wait_copies(groups_left);
}

// --- a whole warp ----------------------------------------------------------------------------------------------------
inline float shuffle_xor(float value, int mask, Place place = Place::here()) {
  std::pair<float, float> mine{value, 0};
  Block::current()->collective(
      mine,
      [mask](std::pair<float, float>** lanes, int) {
        for (int i = 0; i < emulate::kWarp; ++i) lanes[i]->second = lanes[i ^ mask]->first;
      },
      place);
  return mine.second;
}

namespace emulate {

struct LoadMatrix {
  uint32_t* to;
  uint32_t address;
};

// Matrices of which two rows wanted the same banks: shared memory gives 128 bytes at a time, so the 8 rows of 16 bytes
// should lie in different eighths of it. That is not wrong, but slow; so it is counted.
inline int64_t bank_conflicts = 0;

// ldmatrix.x4: lane 8 m + r has the address of row r of matrix m, 8 numbers of 16 bits. Lane l gets of each matrix
// numbers 2 (l % 4) and the next of row l / 4; transposed, number l / 4 of rows 2 (l % 4) and the next.
inline void load_matrices(uint32_t to[4], uint32_t address, bool transposed, Place place) {
  LoadMatrix mine{to, address};
  Block::current()->collective(
      mine,
      [transposed, place](LoadMatrix** lanes, int first) {
        for (int m = 0; m < 4; ++m) {
          uint16_t rows[8][8];
          uint32_t eighths = 0;
          for (int r = 0; r < 8; ++r) {
            const uint32_t from = lanes[8 * m + r]->address;
            if (from % 16 != 0) Block::current()->fail("misaligned row of a matrix, at " + place.text());
            Block::current()->read(from, rows[r], 16, first + 8 * m + r, place);
            eighths |= 1u << from / 16 % 8;
          }
          bank_conflicts += eighths != 0xff;
          for (int l = 0; l < kWarp; ++l) {
            const int a = l / 4, b = 2 * (l % 4);
            const uint32_t low = transposed ? rows[b][a] : rows[a][b],
                           high = transposed ? rows[b + 1][a] : rows[a][b + 1];
            lanes[l]->to[m] = high << 16 | low;
          }
        }
      },
      place);
}

struct Fragments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// d += a b for fragments of a [16, K], b [K, 8] and d [16, 8], where a register holds K / 8 / 2 numbers of a row of a
// or a column of b. Products and their sum are exact up to double precision, rounded once into d: what a tensor core
// does in between is not documented.
template <int K, class Number>
void multiply(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Number number, Place place) {
  Fragments mine{d, a, {b0, b1}};
  Block::current()->collective(
      mine,
      [number](Fragments** lanes, int) {
        constexpr int kPack = K / 8;  // numbers in a register: 2 of 16 bits, or 1 of 32
        static thread_local double left[16][K], right[8][K];
        for (int l = 0; l < kWarp; ++l) {
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < kPack; ++i) {
            const int k = kPack * t + i, k_high = k + K / 2;
            left[g][k] = number(lanes[l]->a[0], i);
            left[g + 8][k] = number(lanes[l]->a[1], i);
            left[g][k_high] = number(lanes[l]->a[2], i);
            left[g + 8][k_high] = number(lanes[l]->a[3], i);
            right[g][k] = number(lanes[l]->b[0], i);
            right[g][k_high] = number(lanes[l]->b[1], i);
          }
        }
        for (int l = 0; l < kWarp; ++l)
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            double sum = lanes[l]->d[i];
            for (int k = 0; k < K; ++k) sum += left[row][k] * right[column][k];
            lanes[l]->d[i] = static_cast<float>(sum);
          }
      },
      place);
}

}  // namespace emulate

inline void load_matrices(uint32_t to[4], uint32_t address, Place place = Place::here()) {
  emulate::load_matrices(to, address, false, place);
}

inline void load_matrices_transposed(uint32_t to[4], uint32_t address, Place place = Place::here()) {
  emulate::load_matrices(to, address, true, place);
}

inline void mma_f16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Place place = Place::here()) {
  const auto number = [](uint32_t pair, int i) {
    return static_cast<double>(to_float(Half{static_cast<uint16_t>(pair >> 16 * i)}));
  };
  emulate::multiply<16>(d, a, b0, b1, number, place);
}

inline void mma_bf16(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Place place = Place::here()) {
  const auto number = [](uint32_t pair, int i) {
    return static_cast<double>(to_float(Bfloat16{static_cast<uint16_t>(pair >> 16 * i)}));
  };
  emulate::multiply<16>(d, a, b0, b1, number, place);
}

// The hardware does not look at the lowest 13 bits.
inline void mma_tf32(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1, Place place = Place::here()) {
  const auto number = [](uint32_t bits, int) { return static_cast<double>(float_of(bits & ~0x1fffu)); };
  emulate::multiply<8>(d, a, b0, b1, number, place);
}

}  // namespace gohsp::cuda
