// SPDX-License-Identifier: Apache-2.0
// Why kernels cannot run on a GPU, in words. Plain C++, for the emulation's tests too.
#pragma once

#include <string>

namespace gohsp::cuda {

// `error`: what CUDA said when it was asked for a kernel, or nullptr where it gave it. Versions: 1000 * major + 10 * minor.
inline std::string reason_of(int driver, int runtime, const char* error) {
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (driver == 0) return "needs the driver of an NVIDIA GPU, and there is none";
  if (error == nullptr) return "";
  const std::string said = std::string(": CUDA says: ") + error;
  if (driver < runtime)
    return "needs a driver for CUDA " + version(runtime) + "; this one is for " + version(driver) + said;
  return "has no code for this GPU" + said;
}

// One of the kernels, which are all compiled for the same GPUs.
const void* any_kernel();

// The reason for the GPU of this number, or the empty string.
std::string missing(int device);

}  // namespace gohsp::cuda
