// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set, and keeps the workspace of each thread. Compiled for the baseline.
#include <sched.h>
#if defined(GOHSP_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

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
#if defined(GOHSP_HAS_AMX)
namespace amx {
extern const KernelTable table;
}
#endif
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

#if defined(GOHSP_HAS_AMX)
// Whether the CPU has tiles and bfloat16, and Linux lets this process use them, which it has to be asked for.
bool allowed_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & kAvx512Bf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Choice>& choices() {
  // Best first.
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") != 0;
#endif
  static const std::vector<Choice> list = {
#if defined(GOHSP_HAS_AMX)
      {&amx::table, vnni && allowed_amx()},
#endif
#if defined(__x86_64__)
      {&avx512vnni::table, vnni},
      {&avx512::table, avx512},
      {&avx2::table, __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0},
#elif defined(__aarch64__)
      {&neon::table, true},
#endif
      {&scalar::table, true}};
  return list;
}

const KernelTable& pick() {
  const char* wanted = std::getenv("GOHSP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Choice& choice : choices())
      if (choice.runs_here) return *choice.table;
  }
  const KernelTable* table = kernels(wanted);
  if (table == nullptr)
    throw std::runtime_error(
        "GOHSP_CPU_CAPABILITY: wanted an instruction set that this build and this machine have "
        "(scalar, avx2, avx512, avx512vnni, amx or neon); got '" +
        std::string(wanted) + "'");
  return *table;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

const KernelTable* kernels(const char* name) {
  for (const Choice& choice : choices())
    if (choice.runs_here && std::strcmp(name, choice.table->name) == 0) return choice.table;
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
