#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

// Launches of GPU kernels that were recorded once and are repeated on other tensors: kernels/replay.py. What Python
// takes for one launch is longer than most of the kernels run; here it is checks of sizes, allocation and the launch.
//
// Nothing of CUDA is needed to build this: the driver is loaded when it is first asked for.

namespace harlora::gpu {

// Keeps a recording until launches_release; returns its number. `facts`, in this order, lists with their lengths first:
//
//   device type, device index
//   inputs:    dtype, dim, sizes, strides
//   buffers:   dtype, dim, sizes; contiguous, allocated for each call
//   outputs:   the buffer of each
//   steps:     0, function, grid x, y, z, threads, bytes of shared memory, and the parameters:
//                 0, input, byte offset | 1, buffer, byte offset | 2, 32 bits, 0 | 3, 64 bits, 0
//              1, out, self, a, b: out = beta·self + alpha·a·b by torch's own product;  2, out, a, b: out = a·b
//              3, out, a: a copy, rounded
//              4 and 5, x, packed, absmax, code, bias, lora_A, lora_B, y, t, nested_absmax, nested_offset, nested_code:
//                 cuda::qlora_gemv with the number blocksize, qlora_gemm with blocksize, tile, parts; alpha: scaling
//              6: the same, with workspace after t: qlora_mma with blocksize, tile, parts
//              7, x, y, code, nested_code and tensors, cuda::encoder_blocks with the numbers heads, hidden, blocksize,
//                 bias, adapter, token_tiles, parts, how many eps, and eps and scaling as the bits of doubles
//              8, grad, packed, absmax, code, lora_A, lora_B, grad_x, u, sums and the nested three: cuda::qlora_dx with
//                 blocksize, tile, parts
//              9, grad, x, t, u, grad_bias, grad_A, grad_B: cuda::lora_grads
//              of which each is the list of tensors, the list of numbers, and beta and alpha as the bits of doubles;
//              a tensor: 0 or 1, input or buffer, offset in values, dim, sizes, strides
//                 2, one that is there for good, address, dtype, dim, sizes, strides | 3, none
//
// `driver`: the library with cuLaunchKernel and cuCtxGetDevice.
int64_t launches_hold(std::vector<int64_t> facts, std::string driver);
void launches_release(int64_t held);

// The outputs; none, and nothing was launched, where `inputs` are not what was recorded, are not aligned to 16 bytes,
// or their device is not the current one.
std::vector<torch::stable::Tensor> launches_run(std::vector<torch::stable::Tensor> inputs, int64_t held,
                                                int64_t stream);

}  // namespace harlora::gpu
