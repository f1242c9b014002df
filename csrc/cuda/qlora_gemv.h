#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

// y = x·Ŵᵀ + bias + scaling·t·lora_Bᵀ and t = x·lora_Aᵀ, for at most 8 rows of x, into `y` and `t`.
//
//   x             (rows, in_features), bfloat16 or float16, contiguous; in_features a multiple of 64 and of blocksize
//   packed        (in_features · out_features / 2), uint8, contiguous, at a multiple of 16 bytes
//   absmax        one for each block: float32, or uint8 with the nested three
//   code          (16), float32
//   blocksize     a power of two of at least 64
//   bias, lora_A, lora_B   in the dtype of x, contiguous
//   y             (rows, out_features); t (rows, rank), both in the dtype of x, contiguous
//   nested_code   (256), float32; nested_absmax one for 256 blocks; nested_offset one
//   stream        the cudaStream_t, from Python
void qlora_gemv(torch::stable::Tensor x, torch::stable::Tensor packed, torch::stable::Tensor absmax,
                torch::stable::Tensor code, int64_t blocksize, std::optional<torch::stable::Tensor> bias,
                std::optional<torch::stable::Tensor> lora_A, std::optional<torch::stable::Tensor> lora_B,
                double scaling, torch::stable::Tensor y, torch::stable::Tensor t,
                std::optional<torch::stable::Tensor> nested_absmax, std::optional<torch::stable::Tensor> nested_offset,
                std::optional<torch::stable::Tensor> nested_code, int64_t stream);

}  // namespace harlora::cuda
