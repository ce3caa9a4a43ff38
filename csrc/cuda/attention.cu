// SPDX-License-Identifier: Apache-2.0
#include "attention.cuh"
#include "launch.cuh"

namespace gohsp::cuda {

// As many tiles of queries in a block as leave a block for every multiprocessor: a block reads all keys and values.
// Where that leaves a multiprocessor few warps, several share the keys of a tile.
template <class Tile>
void launch_tile(AttentionParams p, Stream stream, bool follows) {
  const int64_t heads = p.images * p.head_count;
  const int all = divide_up(p.queries, kQueries);
  if (heads * all == 0) return;
  int blocks = divide_up(all, Tile::WARPS);
  while (blocks < all && heads * blocks < processors()) ++blocks;
  p.tiles = divide_up(all, blocks);
  blocks = divide_up(all, p.tiles);
  const int groups = divide_up(smaller(p.tokens, Tile::KEYS), 16);
  p.parts = heads * all < 8 * processors() ? smaller(groups, Tile::WARPS / p.tiles) : 1;
  const int rows = kQueries * p.tiles + 2 * 16 * groups;
  const int merging = p.parts == 1 ? 0 : p.parts * p.tiles * Tile::MERGE_BYTES;
  const int shared = rows * Tile::ROW_BYTES > merging ? rows * Tile::ROW_BYTES : merging;
  launch<attention_kernel<Tile>>(heads * blocks, 32 * p.tiles * p.parts, shared, p, stream, follows);
}

template <class Narrow, class Wide>
void launch_width(int64_t widest, const AttentionParams& p, Stream stream, bool follows) {
  return widest <= 64 ? launch_tile<Narrow>(p, stream, follows) : launch_tile<Wide>(p, stream, follows);
}

template <class Op>
void launch_16_bit(int64_t widest, const AttentionParams& p, Stream stream, bool follows) {
  return launch_width<AttentionTile<Op, 64, 256, 7, 2>, AttentionTile<Op, 128, 128, 8, 1>>(widest, p, stream, follows);
}

template <class Op>
void launch_32_bit(int64_t widest, const AttentionParams& p, Stream stream, bool follows) {
  return launch_width<AttentionTile<Op, 64, 128, 8, 1>, AttentionTile<Op, 128, 64, 4, 1>>(widest, p, stream, follows);
}

void launch_attention(Precision precision, int64_t widest, const AttentionParams& params, Stream stream, bool follows) {
  if (widest > kWidestHead) throw std::runtime_error("attention: heads of at most 128 channels");
  switch (precision) {
    case Precision::f16: return launch_16_bit<F16>(widest, params, stream, follows);
    case Precision::bf16: return launch_16_bit<Bf16>(widest, params, stream, follows);
    case Precision::tf32: return launch_32_bit<Tf32>(widest, params, stream, follows);
    case Precision::f32: return launch_32_bit<F32>(widest, params, stream, follows);
  }
}

}  // namespace gohsp::cuda
