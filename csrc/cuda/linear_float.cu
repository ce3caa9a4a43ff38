// SPDX-License-Identifier: Apache-2.0
#include "launch_linear.cuh"

namespace gohsp::cuda {

void launch_linear_float(Precision precision, const LinearParams& params, Stream stream, bool follows) {
  if (precision == Precision::tf32)
    launch_tile<LinearTile<Tf32, 64, 64, 4, 1, 1, 4, 4>>(params, stream, follows);
  else
    launch_tile<LinearTile<F32, 64, 64, 4, 1, 1, 4, 4>>(params, stream, follows);
}

}  // namespace gohsp::cuda
