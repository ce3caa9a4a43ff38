// SPDX-License-Identifier: Apache-2.0
// Products in 16 bits; the others are in linear_float.cu, so that two compilers can work at once.
#include "launch_linear.cuh"

// Those of linear_forms.def that this build has; CMake writes the list.
#ifndef GOHSP_LINEAR_FORMS
#define GOHSP_LINEAR_FORMS "linear_forms.def"
#endif

namespace gohsp::cuda {

// The largest tile that gives every multiprocessor a block: it reads least. Of few rows the smallest, whose depth the
// warps share, so that there is something to do for all of them.
template <class Op>
void launch_16_bit(const LinearParams& p, Stream stream, bool follows) {
  using Large = LinearTile<Op, 128, 128, 4, 2, 1, 4, 2>;
  using Small = LinearTile<Op, 64, 64, 4, 1, 1, 4, 4>;
  using Few = LinearTile<Op, 32, 32, 1, 1, 8, 16, 2>;
  if (fills<Large>(p)) return launch_tile<Large>(p, stream, follows);
  return fills<Small>(p) ? launch_tile<Small>(p, stream, follows) : launch_tile<Few>(p, stream, follows);
}

void launch_linear(Precision precision, const LinearParams& params, Stream stream, bool follows) {
#define GOHSP_LINEAR_FORM(name, major, ...) \
  if (capability() == major && launch_linear_##name(precision, params, stream, follows)) return;
#include GOHSP_LINEAR_FORMS
#undef GOHSP_LINEAR_FORM
  switch (precision) {
    case Precision::f16: return launch_16_bit<F16>(params, stream, follows);
    case Precision::bf16: return launch_16_bit<Bf16>(params, stream, follows);
    default: return launch_linear_float(precision, params, stream, follows);
  }
}

}  // namespace gohsp::cuda
