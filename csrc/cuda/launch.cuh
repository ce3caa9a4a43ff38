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
#include <cuda_runtime.h>

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

// More shared memory than 48 KiB a kernel must ask for, once on each device: all that there is.
template <auto kernel>
void allow_shared() {
  static std::array<std::atomic<bool>, kDevices> done{};
  const int device = current_device();
  if (device < kDevices && done[device].load(std::memory_order_relaxed)) return;
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  if (device < kDevices) done[device].store(true, std::memory_order_relaxed);
}

// Major number of the current GPU's compute capability.
inline int capability() {
  static std::array<std::atomic<int>, kDevices> known{};
  const int device = current_device();
  int major = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (major == 0) {
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (device < kDevices) known[device].store(major, std::memory_order_relaxed);
  }
  return major;
}

// Whether so many blocks are enough for a tile of so many rows.
inline bool enough(int64_t blocks, int) { return blocks >= processors(); }

template <auto kernel, class Params>
void launch(int64_t blocks, int threads, int shared_bytes, const Params& params, Stream stream, bool follows) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared<kernel>();
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = static_cast<unsigned>(blocks);
  how.blockDim = threads;
  how.dynamicSmemBytes = shared_bytes;
  how.stream = static_cast<cudaStream_t>(stream);
  how.attrs = &overlap;
  how.numAttrs = follows && capability() >= 9;
  check(cudaLaunchKernelEx(&how, kernel, params));
}

#else

namespace emulate {
// The tests set these to reach every tile. Rows of the largest tile of a linear layer; 0: as on a GPU.
inline int largest_tile = 0;
inline int pretended_capability = 8;  // major
inline int64_t pretended_processors = 108;
inline std::map<std::string, std::pair<int, int> > launched;  // threads and shared bytes of a block, by kernel
inline std::map<std::string, int64_t> reached;                // launches by kernel and by what it was given
inline bool only_noted = false;                               // launches are noted and do nothing

inline std::string forms(const LinearParams& p) {
  std::string text = p.in_chunks != nullptr ? "chunks" : "rows";
  if (p.row_sum != nullptr) text += p.partials != nullptr ? ", statistics left" : ", statistics read";
  text += p.wide ? ", wide" : p.paired ? ", paired" : ", single";
  if (p.out_columns != nullptr) text += ", scattered";
  if (p.residual != nullptr) text += p.residual == p.out ? ", in place" : ", residual";
  return text + (p.partials_out != nullptr ? ", leaves statistics" : "");
}

inline std::string forms(const AttentionParams& p) {
  std::string text = p.aligned ? "aligned" : "unaligned";
  if (p.qk_norm != nullptr) text += ", norms";
  return text + (p.parts > 1 ? ", keys shared" : "");
}

inline std::string forms(const RowsParams& p) {
  std::string text = p.aligned ? "aligned" : "unaligned";
  if (p.normalise) text += ", normalised";
  return text + (p.columns != nullptr ? ", columns" : "");
}

inline std::string forms(const ChecksumParams&) { return ""; }
}  // namespace emulate

inline int64_t processors() { return emulate::pretended_processors; }
inline int capability() { return emulate::pretended_capability; }

inline bool enough(int64_t blocks, int rows) {
  return emulate::largest_tile > 0 ? rows <= emulate::largest_tile : blocks >= processors();
}

template <auto kernel, class Params>
void launch(int64_t blocks, int threads, int shared_bytes, const Params& params, Stream, bool follows) {
  emulate::launched[__PRETTY_FUNCTION__] = {threads, shared_bytes};
  emulate::reached[std::string(__PRETTY_FUNCTION__) + " | " + emulate::forms(params)] += blocks > 0;
  if (emulate::only_noted) return;
  emulate::launch(blocks, threads, shared_bytes, follows, [&params] { kernel(params); });
}

#endif

}  // namespace gohsp::cuda
