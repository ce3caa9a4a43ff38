// SPDX-License-Identifier: Apache-2.0
// Buffers of a call, laid out in the workspace of its thread.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gohsp::GOHSP_ISA {

// Hands out pieces of one block of memory. With a null base it only adds up the sizes.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* place = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return place;
  }
};

// Lays out a struct of buffers by its own `lay_out`, sized first and then placed in the thread's workspace.
template <class Buffers>
inline void place(Buffers& buffers) {
  Arena sizing{nullptr};
  buffers.lay_out(sizing);
  Arena placing{static_cast<char*>(workspace(sizing.used))};
  buffers.lay_out(placing);
}

}  // namespace gohsp::GOHSP_ISA
