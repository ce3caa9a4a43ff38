// SPDX-License-Identifier: Apache-2.0
// The weight formats, and products with matrices of any of them.
#pragma once

#include "formats/bfloat16.h"
#include "formats/float32.h"
#include "formats/int8.h"

namespace gohsp::GOHSP_ISA {

// body(F{}) with the format of these weights.
template <class Body>
inline auto with_format(Format format, const Body& body) {
#define GOHSP_FORMAT(name, type, ...) \
  case Format::name: return body(type{});
  switch (format) { GOHSP_FORMATS(GOHSP_FORMAT) }
#undef GOHSP_FORMAT
  __builtin_unreachable();
}

inline int64_t packed_bytes(Format format, int64_t n, int64_t k) {
  return with_format(format, [=](auto f) { return packed_bytes<decltype(f)>(n, k); });
}

inline void pack(Format format, const Unpacked& from, void* panels) {
  with_format(format, [&](auto f) { pack<decltype(f)>(from, panels); });
}

// From one rounded row of k columns to the next, in bytes: whole vectors, and an odd number of cache lines.
inline int64_t rounded_stride(Format format, int64_t k) {
  return with_format(format, [=](auto f) -> int64_t {
    if constexpr (Rounding<decltype(f)>) return (ceil_div(f.row_bytes(k), 64) | 1) * 64;
    return 0;
  });
}

// Row i of `to` = x[0:columns], rounded for these weights. Two vectors of x behind its columns are overwritten.
inline void round_row(Format format, float* x, int64_t columns, const RoundedRows& to, int64_t i) {
  with_format(format, [&](auto f) {
    if constexpr (Rounding<decltype(f)>) f.round_row(x, columns, to, i);
  });
}

template <class Emit>
inline void multiply(const Lhs& a, int64_t rows, const Matrix& w, const Emit& emit) {
  with_format(w.format, [&](auto f) { multiply<decltype(f)>(f.of(a), rows, w, 0, panel_count(w.n), emit); });
}

}  // namespace gohsp::GOHSP_ISA
