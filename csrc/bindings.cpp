// Registration of the compiled backends, one block per device; no arithmetic.
//
// Written against libtorch's stable ABI: no Python symbol and no C++ ABI of libtorch is used, so one build serves
// every Python and every torch >= 2.10. The public operators harlora::* are defined in kernels/ops.py, which chooses
// between these functions and the reference; their namespace is apart so that both stay callable.

#include <torch/csrc/stable/library.h>

#include "dequantize_4bit.h"

STABLE_TORCH_LIBRARY(harlora_cpp, library) {
  library.def("dequantize_4bit(Tensor packed, Tensor scale, Tensor code, int blocksize, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CPU, library) {
  library.impl("dequantize_4bit", TORCH_BOX(&harlora::cpu::dequantize_4bit));
}

#ifdef HARLORA_CUDA
STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CUDA, library) {
  library.impl("dequantize_4bit", TORCH_BOX(&harlora::cuda::dequantize_4bit));
}
#endif
