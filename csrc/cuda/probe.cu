// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "probe.h"

namespace gohsp::cuda {

// Asks for what a launch would need: a driver that this runtime gets on with, and code for the GPU. A driver that is
// older by a minor number often is good enough, so versions alone decide nothing.
std::string missing(int device) {
  int driver = 0, runtime = 0, before = 0;
  check(cudaDriverGetVersion(&driver));
  check(cudaRuntimeGetVersion(&runtime));
  if (driver == 0) return reason_of(driver, runtime, nullptr);
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, any_kernel());
    cudaSetDevice(before);
  }
  cudaGetLastError();  // or the next call would find it
  return reason_of(driver, runtime, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}

}  // namespace gohsp::cuda
