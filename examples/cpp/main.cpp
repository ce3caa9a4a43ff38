// SPDX-License-Identifier: Apache-2.0
// Runs a pruned model without Python: loads a directory that gohsp.save wrote and prints the logits of images.
//
//   gohsp_example_cpu MODEL_DIRECTORY IMAGES.safetensors      images: float32 [images, 3, height, width], normalised
//
// The default build makes it in build/native and, where nvcc is, gohsp_example_cuda beside it. A program of your own
// includes csrc/cpu/kernels.h or csrc/cuda/kernels.h and links libgohsp_kernels_cpu.a or libgohsp_kernels_cuda.a.
#include <cstdio>
#include <exception>

#ifdef GOHSP_EXAMPLE_CUDA
#include "cuda_encoder.h"
using Encoder = example::CudaEncoder;
#else
#include "cpu_encoder.h"
using Encoder = example::CpuEncoder;
#endif

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s MODEL_DIRECTORY IMAGES.safetensors\n", arguments[0]);
    return 2;
  }
  try {
    const example::Model model(arguments[1]);
    const Encoder encoder(model);
    const example::Tensor images = example::Tensors(arguments[2]).get("images");
    const example::Tensor logits = model.logits(images, encoder);
    for (size_t i = 0; i < logits.data.size(); ++i)
      std::printf("%.6f%c", logits.data[i], (i + 1) % logits.shape[1] == 0 ? '\n' : ' ');
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
