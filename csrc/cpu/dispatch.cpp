// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set, and keeps the workspace of each thread. Compiled for the baseline.
#include <sched.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "crew.h"
#include "kernels.h"

namespace gohsp {

namespace scalar {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512vnni {
extern const KernelTable table;
}
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable table;
}
#endif

namespace {

struct Choice {
  const KernelTable* table;
  bool runs_here;
};

// Best first.
#if defined(__x86_64__)
constexpr int kChoices = 4;
#elif defined(__aarch64__)
constexpr int kChoices = 2;
#else
constexpr int kChoices = 1;
#endif
const Choice* choices() {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0;
  static const Choice list[kChoices] = {
      {&avx512vnni::table, avx512 && __builtin_cpu_supports("avx512vnni") != 0},
      {&avx512::table, avx512},
      {&avx2::table, __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0},
      {&scalar::table, true}};
#elif defined(__aarch64__)
  static const Choice list[kChoices] = {{&neon::table, true}, {&scalar::table, true}};
#else
  static const Choice list[kChoices] = {{&scalar::table, true}};
#endif
  return list;
}

const KernelTable& pick() {
  const char* wanted = std::getenv("GOHSP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    for (int i = 0; i < kChoices; ++i)
      if (choices()[i].runs_here) return *choices()[i].table;
  }
  const KernelTable* table = kernels(wanted);
  if (table == nullptr)
    throw std::runtime_error(
        "GOHSP_CPU_CAPABILITY: wanted an instruction set that this build and this machine have "
        "(scalar, avx2, avx512, avx512vnni or neon); got '" +
        std::string(wanted) + "'");
  return *table;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

const KernelTable* kernels(const char* name) {
  for (int i = 0; i < kChoices; ++i)
    if (choices()[i].runs_here && std::strcmp(name, choices()[i].table->name) == 0) return choices()[i].table;
  return nullptr;
}

const KernelTable& kernels() {
  static const KernelTable& table = pick();
  return table;
}

void* workspace(size_t bytes) {
  static thread_local std::unique_ptr<void, Free> block;
  static thread_local size_t size = 0;
  if (bytes > size) {
    block.reset();
    size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    block.reset(std::aligned_alloc(4096, rounded));
    if (block == nullptr) throw std::bad_alloc();
    size = rounded;
  }
  return block.get();
}

void give_way() { sched_yield(); }

Crew& crew() {
  static thread_local Crew own;
  return own;
}

}  // namespace gohsp
