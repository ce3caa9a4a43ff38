// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "rows.cuh"

namespace gohsp::cuda {

void launch_rows(Precision precision, const RowsParams& params, Stream stream, bool follows) {
  const int64_t blocks = divide_up<int64_t>(params.rows, kRowsThreads / 32);
  switch (precision) {
    case Precision::f16: return launch<rows_kernel<Half>>(blocks, kRowsThreads, 0, params, stream, follows);
    case Precision::bf16: return launch<rows_kernel<Bfloat16>>(blocks, kRowsThreads, 0, params, stream, follows);
    default: return launch<rows_kernel<float>>(blocks, kRowsThreads, 0, params, stream, follows);
  }
}

}  // namespace gohsp::cuda
