// The kernels of csrc/cuda/ that the model of device.h can run, as the CPU's kernels of their operators.

#include <torch/csrc/stable/library.h>

#include "cuda/qlora_gemv.cu"

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CPU, library) {
  library.impl("qlora_gemv", TORCH_BOX(&harlora::cuda::qlora_gemv));
}
