// SPDX-License-Identifier: Apache-2.0
// Starts the linear kernel on a tile.
#pragma once

#include "launch.cuh"
#include "linear.cuh"

namespace gohsp::cuda {

template <class Tile, Finish finish>
void launch_finish(const LinearParams& p, Stream stream, bool follows) {
  constexpr int64_t kElements = kChunkBytes / sizeof(typename Tile::Op::Element);  // of a chunk
  if (p.rows * (p.x_stride / kElements) > UINT32_MAX || int64_t{p.n} * p.chunks > INT32_MAX)
    throw std::runtime_error("x, weight: wanted at most 64 GiB and 32 GiB");
  const int64_t others = p.out == p.residual ? 0 : divide_up(p.out_features - p.n, Tile::BN);
  const int64_t blocks = divide_up<int64_t>(p.rows, Tile::BM) * (divide_up(p.n, Tile::BN) + others);
  launch<linear_kernel<Tile, finish>>(blocks, Tile::THREADS, LinearPlaces<Tile>::SHARED_BYTES, p, stream, follows);
}

template <class Tile>
void launch_tile(const LinearParams& p, Stream stream, bool follows) {
  switch (p.activation) {
    case Activation::identity: return launch_finish<Tile, Finish::identity>(p, stream, follows);
    case Activation::gelu: return launch_finish<Tile, Finish::gelu>(p, stream, follows);
    default: return launch_finish<Tile, Finish::other>(p, stream, follows);
  }
}

// Whether there is a block for every multiprocessor.
template <class Tile>
bool fills(const LinearParams& p) {
  return enough(divide_up<int64_t>(p.rows, Tile::BM) * divide_up(p.n, Tile::BN), Tile::BM);
}

}  // namespace gohsp::cuda
