// SPDX-License-Identifier: Apache-2.0
// The one place that starts a kernel: on a stream of the GPU, or in the emulation.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"
#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#endif

namespace gohsp::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

constexpr int kDevices = 64;  // whose properties are remembered

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

// Multiprocessors of the current GPU.
inline int64_t processors() {
  static std::array<std::atomic<int>, kDevices> known{};
  const int device = current_device();
  int count = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kDevices) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// More shared memory than 48 KiB a kernel must ask for, once on each device.
template <auto kernel>
void allow_shared(int bytes) {
  static std::array<std::atomic<bool>, kDevices> done{};
  const int device = current_device();
  if (device < kDevices && done[device].load(std::memory_order_relaxed)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (device < kDevices) done[device].store(true, std::memory_order_relaxed);
}

template <auto kernel, class Params>
void launch(int64_t blocks, int threads, int shared_bytes, const Params& params, Stream stream) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared<kernel>(shared_bytes);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError());
}

#else

namespace emulate {
inline int64_t pretended_processors = 108;                   // the tests set it to reach every tile
inline std::map<std::string, std::pair<int, int>> launched;  // threads and shared bytes of a block, by kernel
}  // namespace emulate

inline int64_t processors() { return emulate::pretended_processors; }

template <auto kernel, class Params>
void launch(int64_t blocks, int threads, int shared_bytes, const Params& params, Stream) {
  emulate::launched[__PRETTY_FUNCTION__] = {threads, shared_bytes};
  emulate::launch(blocks, threads, shared_bytes, [&params] { kernel(params); });
}

#endif

}  // namespace gohsp::cuda
