// SPDX-License-Identifier: Apache-2.0
// Runs a pruned model without Python: loads a directory that gohsp.save wrote and prints the logits of images.
//
//   gohsp_example MODEL_DIRECTORY IMAGES.safetensors      images: float32 [images, 3, height, width], normalised
//
// The default build makes build/native/gohsp_example. A program of your own links libgohsp_kernels_cpu.a of the same
// folder and includes csrc/cpu/kernels.h.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <thread>
#include <vector>

#include "model.h"

namespace {

void run_in_threads(int64_t workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s MODEL_DIRECTORY IMAGES.safetensors\n", arguments[0]);
    return 2;
  }
  try {
    const example::Model model(arguments[1]);
    const example::Tensor images = example::Tensors(arguments[2]).get("images");
    const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const example::Tensor logits = model(images, gohsp::Parallel{cores, run_in_threads});
    for (size_t i = 0; i < logits.data.size(); ++i)
      std::printf("%.6f%c", logits.data[i], (i + 1) % logits.shape[1] == 0 ? '\n' : ' ');
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
