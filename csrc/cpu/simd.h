// SPDX-License-Identifier: Apache-2.0
// The vector type that all kernels are written in, and the functions on it that the hardware has no instruction for.
//
// It is the compiler's own vector extension at the width of the instruction set, so one text serves every set and
// almost no intrinsic is needed: GCC and Clang turn a * b + c into a fused multiply-add (-ffp-contract=fast), a
// comparison and selection into blends, a shuffle by a constant or loaded index into the matching permute. The one
// thing that they do not find is dot products of bytes and of bfloat16 numbers (dot4, dot2).
//
// Each instruction set compiles this text in its own namespace (GOHSP_ISA), and nothing here comes from the standard
// library: an inline function of it, compiled with AVX-512, could be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef GOHSP_LANES
#error "include this from one of the files in isa, which set GOHSP_ISA and GOHSP_LANES"
#endif

namespace gohsp::GOHSP_ISA {

constexpr int64_t W = GOHSP_LANES;
typedef float Vec __attribute__((vector_size(4 * GOHSP_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * GOHSP_LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * GOHSP_LANES)));
typedef uint8_t ByteVec __attribute__((vector_size(4 * GOHSP_LANES)));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Unaligned load and store: memcpy of a vector is one instruction.
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline IntVec load_ints(const int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The low byte of each lane. GCC takes a conversion of vectors apart into scalars here, hence the other two ways.
inline void store_bytes(uint8_t* p, IntVec v) {
#if GOHSP_LANES == 16 && defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#elif defined(__clang__)
  typedef uint8_t Narrow __attribute__((vector_size(GOHSP_LANES)));
  const Narrow bytes = __builtin_convertvector(v, Narrow);
  __builtin_memcpy(p, &bytes, sizeof bytes);
#else
  ByteVec lowest = {};
  for (int64_t i = 0; i < W; ++i) lowest[i] = static_cast<uint8_t>(4 * i);
  const ByteVec bytes = __builtin_shuffle((ByteVec)v, lowest);
  __builtin_memcpy(p, &bytes, W);
#endif
}
inline IntVec splat_ints(const void* p) {
  int32_t s;
  __builtin_memcpy(&s, p, sizeof s);
  return s + IntVec{};
}

// The first n lanes only, for the ragged end of a row that is not ours to overrun; the other lanes read as zero.
inline Vec load_first(const float* p, int64_t n) {
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// s - 0 is s whatever s is, so the compiler leaves just the broadcast; s + 0 it would have to add, for the sake of -0.
inline Vec splat(float s) { return s - Vec{}; }
inline Vec bits_as_float(IntVec v) { return (Vec)v; }
inline IntVec float_as_bits(Vec v) { return (IntVec)v; }

// Written so that a NaN in x stays: comparisons with NaN are false, and then x is taken.
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Lane i of the result is lane index[i] of v, or of a followed by b. Clang has no shuffle by a variable index.
#if defined(__clang__)
inline Vec permute(Vec v, IntVec index) {
  Vec r;
  for (int64_t i = 0; i < W; ++i) r[i] = v[index[i]];
  return r;
}
inline Vec permute(Vec a, Vec b, IntVec index) {
  Vec r;
  for (int64_t i = 0; i < W; ++i) r[i] = index[i] < W ? a[index[i]] : b[index[i] - W];
  return r;
}
#else
inline Vec permute(Vec v, IntVec index) { return __builtin_shuffle(v, index); }
inline Vec permute(Vec a, Vec b, IntVec index) { return __builtin_shuffle(a, b, index); }
#endif

template <int64_t Step>
inline IntVec rotation() {
  IntVec r = {};
  for (int64_t i = 0; i < W; ++i) r[i] = static_cast<int32_t>((i + Step) % W);
  return r;
}

template <int64_t Step = W / 2>
inline float sum_lanes(Vec v) {
  v += permute(v, rotation<Step>());
  if constexpr (Step > 1) return sum_lanes<Step / 2>(v);
  return v[0];
}
template <int64_t Step = W / 2>
inline float max_lanes(Vec v) {
  v = larger(v, permute(v, rotation<Step>()));
  if constexpr (Step > 1) return max_lanes<Step / 2>(v);
  return v[0];
}

// Dot products of bytes: lane by lane, acc plus the sum over the lane's four bytes of activation times weight.
//
// Weights are signed, in [-127, 127]. Activations take kLevels + 1 values from kLowest up. Where the instruction adds
// two products in 16 bits (vpmaddubsw), kLevels is 127, so that 2 * 127 * 127 fits and nothing saturates; elsewhere it
// is 255. Where the instruction takes two signed operands (sdot), activations begin at -128. Zero points absorb that.
constexpr int32_t kLevels = GOHSP_ACTIVATION_LEVELS;

#if GOHSP_LANES == 16 && defined(__AVX512VNNI__)
constexpr int32_t kLowest = 0;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)activations, (__m512i)weights);
}
#elif GOHSP_LANES == 16 && defined(__AVX512BW__)
constexpr int32_t kLowest = 0;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)activations, (__m512i)weights);
  return acc + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif GOHSP_LANES == 8 && defined(__AVXVNNI__)
constexpr int32_t kLowest = 0;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)activations, (__m256i)weights);
}
#elif GOHSP_LANES == 8 && defined(__AVX2__)
constexpr int32_t kLowest = 0;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)activations, (__m256i)weights);
  return acc + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif GOHSP_LANES == 4 && defined(__ARM_FEATURE_DOTPROD)
constexpr int32_t kLowest = -128;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
  return (IntVec)vdotq_s32((int32x4_t)acc, (int8x16_t)activations, (int8x16_t)weights);
}
#else
constexpr int32_t kLowest = 0;
inline IntVec dot4(IntVec acc, IntVec activations, IntVec weights) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) acc += ((activations >> 8 * q) & 255) * ((weights << (24 - 8 * q)) >> 24);
  return acc;
}
#endif

// Dot products of pairs of bfloat16 numbers: lane by lane, sum plus the products of the lane's two halves.
#if GOHSP_LANES == 16 && defined(__AVX512BF16__)
constexpr bool kHasPairProducts = true;
inline Vec dot2(Vec sum, Vec x, Vec w) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
#elif GOHSP_LANES == 4 && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kHasPairProducts = true;
inline Vec dot2(Vec sum, Vec x, Vec w) { return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)w); }
#else
constexpr bool kHasPairProducts = false;
inline Vec dot2(Vec sum, Vec x, Vec w) {
  const IntVec xs = float_as_bits(x), ws = float_as_bits(w);
  sum += bits_as_float(xs << 16) * bits_as_float(ws << 16);
  sum += bits_as_float(xs & ~0xffff) * bits_as_float(ws & ~0xffff);
  return sum;
}
#endif

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits

// exp(x): x = n ln2 + r with |r| <= ln2 / 2, exp(r) by its Taylor polynomial of degree 6 (remainder below 2e-8 there),
// times 2^n put together from exponent bits. Inputs outside [-87.3, 88.0] are clamped, so nothing overflows and
// exp(-inf) is a number near the smallest normal one; NaN stays NaN because 2^n multiplies it.
inline Vec exp(Vec x) {
  x = at_most(at_least(x, -87.3f), 88.0f);
  const Vec shifted = x * 1.44269504088896341f + kRound;
  const Vec n = shifted - kRound;
  // ln2 in two parts, the first exact in few bits, so that n * part loses nothing.
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.0f / 720.0f);
  p = p * r + (1.0f / 120.0f);
  p = p * r + (1.0f / 24.0f);
  p = p * r + (1.0f / 6.0f);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec exponent = (float_as_bits(shifted) - float_as_bits(splat(kRound)) + 127) << 23;
  return p * bits_as_float(exponent);
}

// erf(z) = z P(z^2) / Q(z^2) on |z| <= 3.92, where erf has reached 1 to fp32. The coefficients are our fit
// (iteratively reweighted least squares, error 2e-8 before rounding); a test bounds the error in fp32.
inline Vec erf(Vec z) {
  z = at_most(at_least(z, -3.92f), 3.92f);
  const Vec t = z * z;
  Vec p = splat(2.0347208646853687e-06f);
  p = p * t + 0.0002874772762879729f;
  p = p * t + 0.00386829674243927f;
  p = p * t + 0.0530603863298893f;
  p = p * t + 0.192763552069664f;
  p = p * t + 1.128378987312317f;
  Vec q = splat(3.80703822884243e-05f);
  q = q * t + 0.001188104972243309f;
  q = q * t + 0.01517223659902811f;
  q = q * t + 0.11508437991142273f;
  q = q * t + 0.504163920879364f;
  q = q * t + 1.0f;
  return z * p / q;
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

inline Vec gelu(Vec x) { return 0.5f * x * (1.0f + erf(x * 0.707106781186547524f)); }

// 0.5 (1 + tanh(u)) = sigmoid(2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) { return x * sigmoid(1.59576912160573071f * x * (1.0f + 0.044715f * x * x)); }

}  // namespace gohsp::GOHSP_ISA
