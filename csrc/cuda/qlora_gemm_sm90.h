#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

// y = x·Ŵᵀ + bias + scaling·t·lora_Bᵀ, for many rows of x, on GPUs of compute capability 9.0.
//
//   x             (rows, in_features), bfloat16 or float16, contiguous; in_features a multiple of 64 and of blocksize
//   packed        (in_features · out_features / 2), uint8, contiguous
//   absmax        one for each block: float32, or uint8 with the nested three
//   code          (16), float32
//   blocksize     a power of two of at least 64
//   bias          (out_features), in the dtype of x
//   lora_A, lora_B   (rank, in_features) and (out_features, rank), in the dtype of x or float32, contiguous
//   y             (rows, out_features), in the dtype of x, contiguous; out_features a multiple of 8
//   t             (rows, rank), likewise: x·lora_Aᵀ
//   tile          rows of x of a tile: 64, 128 or 256
//   parts         blocks of threads that share the sum over in_features, 1 to 8
//   nested_code   (256), float32; nested_absmax one for 256 blocks; nested_offset one
//   stream        the cudaStream_t, from Python
//
// x, packed, lora_A, y and t are at multiples of 16 bytes.
void qlora_gemm(torch::stable::Tensor x, torch::stable::Tensor packed, torch::stable::Tensor absmax,
                torch::stable::Tensor code, int64_t blocksize, std::optional<torch::stable::Tensor> bias,
                std::optional<torch::stable::Tensor> lora_A, std::optional<torch::stable::Tensor> lora_B,
                double scaling, torch::stable::Tensor y, torch::stable::Tensor t, int64_t tile, int64_t parts,
                std::optional<torch::stable::Tensor> nested_absmax, std::optional<torch::stable::Tensor> nested_offset,
                std::optional<torch::stable::Tensor> nested_code, int64_t stream);

}  // namespace harlora::cuda
