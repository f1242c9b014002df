#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

// dX = dY·Ŵ + u·lora_A and u = scaling·dY·lora_B, from the packed weight, on GPUs of compute capability 8.0 and more.
//
//   grad          dY (rows, out_features), bfloat16 or float16, contiguous
//   packed        (in_features · out_features / 2), uint8, contiguous; in_features a multiple of 64 and of blocksize
//   absmax        one for each block: float32, or uint8 with the nested three
//   code          (16), float32
//   blocksize     a power of two of at least 64
//   lora_A, lora_B   (rank, in_features) and (out_features, rank), in the dtype of dY or float32, contiguous
//   grad_x        dX (rows, in_features), in the dtype of dY, contiguous; none: u alone
//   u             (rows, rank up to the next multiple of 16), likewise, zeros past the rank; none without adapter
//   sums          (parts, rows, in_features), float32, where there are more parts than one and a tile is not of 256
//   tile          rows of dY of a tile: 16, 32, 64 or 128, or 256, on GPUs of compute capability 9.0 alone and for
//                 out_features that are a multiple of 8
//   parts         blocks of threads that share the sum over out_features, 1 to 32, with a tile of 256 to 8, each with
//                 whole steps of 64, or with a tile of 128 of 32
//   nested_code   (256), float32; nested_absmax one for 256 blocks; nested_offset one
//   stream        the cudaStream_t, from Python
//
// grad, packed, lora_A, lora_B, grad_x, u and sums are at multiples of 16 bytes.
void qlora_dx(torch::stable::Tensor grad, torch::stable::Tensor packed, torch::stable::Tensor absmax,
              torch::stable::Tensor code, int64_t blocksize, std::optional<torch::stable::Tensor> lora_A,
              std::optional<torch::stable::Tensor> lora_B, double scaling, std::optional<torch::stable::Tensor> grad_x,
              std::optional<torch::stable::Tensor> u, std::optional<torch::stable::Tensor> sums, int64_t tile,
              int64_t parts, std::optional<torch::stable::Tensor> nested_absmax,
              std::optional<torch::stable::Tensor> nested_offset, std::optional<torch::stable::Tensor> nested_code,
              int64_t stream);

}  // namespace harlora::cuda
