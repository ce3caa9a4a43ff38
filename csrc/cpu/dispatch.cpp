// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set, and keeps the workspace of each thread. Compiled for the baseline.
#include <sched.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__)
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

#include "kernels.h"
#include "throttle.h"

namespace gohsp {

// isa_built.def, written by CMake, is isa.def without the sets that this build does not have.
#define GOHSP_ISA_SET(name, processor, runs_here, options) \
  namespace name {                                         \
  extern const KernelTable table;                          \
  }
#include "isa_built.def"
#undef GOHSP_ISA_SET

namespace {

// Whether the CPU has tiles with bfloat16 and bytes, and Linux lets this process use them, which it has to be asked for.
[[maybe_unused]] bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAvx512Bf16 = 1u << 5;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0)
    return false;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & kAvx512Bf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#if defined(__x86_64__)
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
// Whether an Arm CPU has a feature, by the name that compilers have for it.
[[maybe_unused]] bool has(const char* feature) {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20, kBf16 = 1ul << 14;  // of HWCAP and HWCAP2, as Linux defined them
  if (std::strcmp(feature, "dotprod") == 0) return (getauxval(AT_HWCAP) & kDotProduct) != 0;
  if (std::strcmp(feature, "bf16") == 0) return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  const bool dot_product = std::strcmp(feature, "dotprod") == 0;
  int present = 0;
  size_t size = sizeof present;
  const char* name = dot_product ? "hw.optional.arm.FEAT_DotProd" : "hw.optional.arm.FEAT_BF16";
  return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present != 0;
#endif
  return false;
}
#define HAS(feature) has(feature)
#endif

// CPUs have run bfloat16 products at two times and at half the rate of float32's. What is between pays for nothing.
constexpr double kWorthwhile = 1.25;

struct Choice {
  const KernelTable* table;
  bool runs_here;
};

const std::vector<Choice>& choices() {
#define GOHSP_ISA_SET(name, processor, runs_here, options) {&name::table, runs_here},
  static const std::vector<Choice> list = {
#include "isa_built.def"
  };
#undef GOHSP_ISA_SET
  return list;
}

const KernelTable& pick() {
  const char* wanted = std::getenv("GOHSP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Choice& choice : choices())
      if (choice.runs_here && (!choice.table->for_bfloat16 || bfloat16_gain_in_vectors() >= kWorthwhile))
        return *choice.table;
  }
  if (const KernelTable* table = kernels(wanted)) return *table;
  std::string message = "GOHSP_CPU_CAPABILITY: wanted an instruction set that this build and this machine have, of";
  for (const char* const* name = instruction_sets(); *name != nullptr; ++name) message += std::string(" ") + *name;
  throw std::runtime_error(message + "; got '" + wanted + "'");
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

const char* const* instruction_sets() {
#define GOHSP_ISA_SET(name, processor, runs_here, options) #name,
  static const char* const names[] = {
#include "isa/isa.def"
      nullptr};
#undef GOHSP_ISA_SET
  return names;
}

const KernelTable* kernels(const char* name) {
  for (const Choice& choice : choices())
    if (choice.runs_here && std::strcmp(name, choice.table->name) == 0) return choice.table;
  return nullptr;
}

double bfloat16_gain_in_vectors() {
  static const double gain = [] {
    for (const Choice& choice : choices())
      if (choice.runs_here && choice.table->for_bfloat16) return choice.table->bfloat16_gain();
    return 0.0;
  }();
  return gain;
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

WorkerThrottle& worker_throttle() {
  static thread_local WorkerThrottle own;
  return own;
}

}  // namespace gohsp
