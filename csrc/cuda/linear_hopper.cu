// SPDX-License-Identifier: Apache-2.0
// Compiled for sm_90a alone.
#include "launch_linear.cuh"

namespace gohsp::cuda {

template <class Op>
bool launch_warpgroups(const LinearParams& p, Stream stream, bool follows) {
  using Large = WarpgroupTile<Op, 128, 128, 3, 2>;
  using Small = WarpgroupTile<Op, 64, 64, 4, 3>;
  if (fills<Large>(p)) {
    launch_tile<Large>(p, stream, follows);
    return true;
  }
  if (!fills<Small>(p)) return false;
  launch_tile<Small>(p, stream, follows);
  return true;
}

bool launch_linear_hopper(Precision precision, const LinearParams& params, Stream stream, bool follows) {
  switch (precision) {
    case Precision::f16: return launch_warpgroups<F16>(params, stream, follows);
    case Precision::bf16: return launch_warpgroups<Bf16>(params, stream, follows);
    default: return false;
  }
}

}  // namespace gohsp::cuda
