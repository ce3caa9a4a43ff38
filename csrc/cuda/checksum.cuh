// SPDX-License-Identifier: Apache-2.0
// A number that changes with the bytes of a piece of memory, to tell whether weights are still those that were packed,
// at the speed of the memory. As csrc/cpu/checksum.h: words go into chains that are one to one in each of them, so a
// change of one word always shows. Not made to resist somebody who looks for collisions.
#pragma once

#include "operands.cuh"

namespace gohsp::cuda {

constexpr int kChecksumThreads = 256;

GOHSP_DEVICE uint32_t extend_chain(uint32_t chain, uint32_t word) {
  chain ^= word;
  return (chain << 13 | chain >> 19) * 0x9e3779b1u;
}

GOHSP_DEVICE uint64_t scatter(uint64_t x) {
  x = (x ^ x >> 29) * 0x9fb21c651e98df25u;
  return x ^ x >> 32;
}

GOHSP_DEVICE uint32_t byte_at(const char* place) { return static_cast<uint8_t>(load_global(place)); }

// A block has one piece.
GOHSP_KERNEL(kChecksumThreads, 4) checksum_kernel(const ChecksumParams p) {
  const int me = thread_index();
  const int64_t bytes = load_global(p.pieces + 2 * block_index() + 1);
  const char* begin = reinterpret_cast<const char*>(load_global(p.pieces + 2 * block_index()));
  const int64_t head = smaller<int64_t>(bytes, -reinterpret_cast<int64_t>(begin) & (kChunkBytes - 1));
  const int64_t chunks = (bytes - head) / kChunkBytes;
  uint32_t chains[4] = {0x85ebca6bu, 0x85ebca6cu, 0x85ebca6du, 0x85ebca6eu};
  GOHSP_UNROLL_BY(4)
  for (int64_t i = me; i < chunks; i += kChecksumThreads) {
    const Bytes16 chunk = load_global(reinterpret_cast<const Bytes16*>(begin + head) + i);
    GOHSP_UNROLL
    for (int k = 0; k < 4; ++k) chains[k] = extend_chain(chains[k], chunk.words[k]);
  }
  if (me == 0) {  // what lies before the first and behind the last multiple of 16 bytes
    for (int64_t i = 0; i < head; ++i) chains[0] = extend_chain(chains[0], byte_at(begin + i));
    for (int64_t i = head + chunks * kChunkBytes; i < bytes; ++i)
      chains[0] = extend_chain(chains[0], byte_at(begin + i));
  }
  uint64_t sum = scatter(chains[0] | uint64_t{chains[1]} << 32) + 3 * scatter(chains[2] | uint64_t{chains[3]} << 32);
  sum = scatter(sum * (2 * me + 1));
  for (int half = kChecksumThreads / 2; half > 0; half /= 2) {
    store_shared(me * 8, sum);
    barrier();
    if (me < half) sum += load_shared<uint64_t>((me + half) * 8);
    barrier();
  }
  if (me == 0) store_global(p.sums + block_index(), sum ^ static_cast<uint64_t>(bytes));
}

}  // namespace gohsp::cuda
