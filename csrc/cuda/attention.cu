// SPDX-License-Identifier: Apache-2.0
#include "attention.cuh"
#include "launch.cuh"

namespace gohsp::cuda {

template <class Tile>
void launch_tile(const AttentionParams& p, Stream stream) {
  const int64_t blocks = int64_t{divide_up(p.queries, kAttentionQueries)} * p.head_count * p.images;
  launch<attention_kernel<Tile>>(blocks, kAttentionThreads, Tile::SHARED_BYTES, p, stream);
}

template <class Op, int NARROW_KEYS, int WIDE_KEYS, int NARROW_BLOCKS>
void launch_width(int64_t widest, const AttentionParams& p, Stream stream) {
  return widest <= 64 ? launch_tile<AttentionTile<Op, 64, NARROW_KEYS, NARROW_BLOCKS>>(p, stream)
                      : launch_tile<AttentionTile<Op, 128, WIDE_KEYS, 2>>(p, stream);
}

void launch_attention(Precision precision, int64_t widest, const AttentionParams& params, Stream stream) {
  if (widest > kWidestHead) throw std::runtime_error("attention: heads of at most 128 channels");
  switch (precision) {
    case Precision::f16: return launch_width<F16, 64, 64, 4>(widest, params, stream);
    case Precision::bf16: return launch_width<Bf16, 64, 64, 4>(widest, params, stream);
    case Precision::tf32: return launch_width<Tf32, 32, 16, 3>(widest, params, stream);
    case Precision::f32: return launch_width<F32, 32, 16, 3>(widest, params, stream);
  }
}

}  // namespace gohsp::cuda
