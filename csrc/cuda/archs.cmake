# SPDX-License-Identifier: Apache-2.0
# The GPUs that the kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES, where nobody names them.
#
# `-real` is machine code, which later GPUs of the same major number run too (80 runs on 8.9). `100` is machine code and
# PTX: every GPU after it that has no machine code here compiles the PTX when it loads the library. An nvcc ends at the
# first name that it does not know, so the list depends on its version.
function(gohsp_cuda_archs nvcc_version result)
  if(nvcc_version VERSION_LESS 12.8)
    set(${result} "80-real;90" PARENT_SCOPE)
  else()
    set(${result} "80-real;90-real;100;120-real" PARENT_SCOPE)
  endif()
endfunction()
