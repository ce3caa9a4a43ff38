// SPDX-License-Identifier: Apache-2.0
#include "attention.cuh"
#include "launch.cuh"

namespace gohsp::cuda {

template <class Tile>
void launch_tile(const AttentionParams& p, Stream stream) {
  const int64_t blocks = int64_t{divide_up(p.queries, kAttentionQueries)} * p.head_count * p.images;
  launch<attention_kernel<Tile>>(blocks, kAttentionThreads, Tile::SHARED_BYTES, p, stream);
}

template <class Op>
void launch_16_bit(int64_t widest, const AttentionParams& p, Stream stream) {
  return widest <= 64 ? launch_tile<AttentionTile<Op, 64, 64, 4>>(p, stream)
                      : launch_tile<AttentionTile<Op, 128, 64, 2>>(p, stream);
}

void launch_attention(Precision precision, int64_t widest, const AttentionParams& params, Stream stream) {
  if (widest > kWidestHead) throw std::runtime_error("attention: heads of at most 128 channels");
  switch (precision) {
    case Precision::f16: return launch_16_bit<F16>(widest, params, stream);
    case Precision::bf16: return launch_16_bit<Bf16>(widest, params, stream);
    case Precision::tf32: return launch_tile<AttentionTile<Tf32, 128, 32, 2>>(params, stream);
    case Precision::f32: return launch_tile<AttentionTile<F32, 128, 32, 2>>(params, stream);
  }
}

}  // namespace gohsp::cuda
