// SPDX-License-Identifier: Apache-2.0
// A checksum of bytes, to tell whether weights are still those that were packed, at the speed of the memory.
//
// Each 32-bit lane of a few vectors is a chain h = rotate(h ^ word) * odd, which is one to one in every word: a change
// of one word always changes its chain, whatever follows. Several changed words escape only where all chains that they
// reach happen to end as before, which for a chain is one case in 2^32. The rotation brings the top bit down, so that
// a sign, which a multiplication alone would leave where it is, reaches the other bits. Not made to resist somebody who
// looks for collisions.
#pragma once

#include <cstddef>

#include "simd.h"

namespace gohsp::GOHSP_ISA {

typedef uint32_t WordVec __attribute__((vector_size(4 * GOHSP_LANES)));

constexpr int64_t kChains = 8;  // enough that the latency of a multiplication is not what limits
constexpr int64_t kChainBytes = kChains * static_cast<int64_t>(sizeof(WordVec));

inline void extend(WordVec (&chains)[kChains], const char* p) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kChains; ++i) {
    WordVec word;
    __builtin_memcpy(&word, p + i * static_cast<int64_t>(sizeof word), sizeof word);
    word ^= chains[i];
    chains[i] = ((word << 13) | (word >> 19)) * 0x9e3779b1u;
  }
}

// The result differs between instruction sets, as the number of lanes does: it is for one process only.
inline uint64_t checksum(const void* data, int64_t bytes) {
  WordVec chains[kChains];
  for (int64_t i = 0; i < kChains; ++i) chains[i] = WordVec{} + static_cast<uint32_t>(0x85ebca6bu + i);
  const char* p = static_cast<const char*>(data);
  int64_t left = bytes;
  for (; left >= kChainBytes; left -= kChainBytes, p += kChainBytes) extend(chains, p);
  if (left > 0) {
    alignas(64) char last[kChainBytes] = {};
    __builtin_memcpy(last, p, static_cast<size_t>(left));
    extend(chains, last);
  }
  uint64_t sum = static_cast<uint64_t>(bytes);
  for (int64_t i = 0; i < kChains; ++i)
    for (int64_t lane = 0; lane < W; ++lane) {
      sum = (sum ^ chains[i][lane]) * 0x9fb21c651e98df25u;
      sum ^= sum >> 29;
    }
  return sum;
}

}  // namespace gohsp::GOHSP_ISA
