// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "linear.cuh"

namespace gohsp::cuda {

template <class Tile>
void launch_tile(const LinearParams& p, Stream stream) {
  const int64_t others = p.out == p.residual ? 0 : divide_up(p.out_features - p.n, Tile::BN);
  const int64_t blocks = divide_up<int64_t>(p.rows, Tile::BM) * (divide_up(p.n, Tile::BN) + others);
  launch<linear_kernel<Tile>>(blocks, Tile::THREADS, Tile::SHARED_BYTES, p, stream);
}

// The large tile reads least; the small one where the large would leave multiprocessors without a block.
template <class Op>
void launch_16_bit(const LinearParams& p, Stream stream) {
  using Large = LinearTile<Op, 128, 128, 4, 2, 2>;
  using Small = LinearTile<Op, 64, 64, 4, 1, 4>;
  const bool large = divide_up<int64_t>(p.rows, 128) * divide_up(p.n, 128) >= processors();
  return large ? launch_tile<Large>(p, stream) : launch_tile<Small>(p, stream);
}

void launch_linear(Precision precision, const LinearParams& params, Stream stream) {
  switch (precision) {
    case Precision::f16: return launch_16_bit<F16>(params, stream);
    case Precision::bf16: return launch_16_bit<Bf16>(params, stream);
    case Precision::tf32: return launch_tile<LinearTile<Tf32, 64, 64, 4, 1, 4>>(params, stream);
    case Precision::f32: return launch_tile<LinearTile<F32, 64, 64, 4, 1, 4>>(params, stream);
  }
}

}  // namespace gohsp::cuda
