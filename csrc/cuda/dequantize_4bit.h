#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

// Fill `out` with code[nibble] * absmax[index / blocksize]: float32 arithmetic, one rounding to the dtype of `out`.
//
//   packed     ((n + 1) / 2), uint8, contiguous; the even element in the high half of its byte
//   absmax     (ceil(n / blocksize)), float32, contiguous; nested scales are decoded by the caller
//   code       (16), float32, contiguous
//   blocksize  a power of two, 32 to 4096, so a block never begins inside a byte
//   out        n elements, contiguous; float32, bfloat16, float16 or float64
//   stream     the cudaStream_t; from Python, since a library that also loads beside a torch without CUDA cannot ask
void dequantize_4bit(torch::stable::Tensor packed, torch::stable::Tensor absmax, torch::stable::Tensor code,
                     int64_t blocksize, torch::stable::Tensor out, std::optional<torch::stable::Tensor> nested_absmax,
                     std::optional<torch::stable::Tensor> nested_offset,
                     std::optional<torch::stable::Tensor> nested_code, int64_t stream);

}  // namespace harlora::cuda
