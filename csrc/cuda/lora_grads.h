#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

// dA = uᵀ·x, dB = scaling·dYᵀ·t and dbias = Σ dY, those of which there is a tensor, in one launch, which reads x and dY
// once for each 32 of the rank.
//
//   grad          dY (rows, out_features), bfloat16 or float16, contiguous at a multiple of 16 bytes
//   x             (rows, in_features), likewise, for dA alone; in_features a multiple of 8
//   t             (rows, rank), likewise, for dB alone
//   u             scaling·dY·lora_B as qlora_dx.h has it, for dA alone
//   grad_bias     (out_features), in the dtype of dY, contiguous
//   grad_A, grad_B   (rank, in_features) and (out_features, rank), both in the dtype of dY or in float32, contiguous
//   stream        the cudaStream_t, from Python
void lora_grads(torch::stable::Tensor grad, std::optional<torch::stable::Tensor> x,
                std::optional<torch::stable::Tensor> t, std::optional<torch::stable::Tensor> u, double scaling,
                std::optional<torch::stable::Tensor> grad_bias, std::optional<torch::stable::Tensor> grad_A,
                std::optional<torch::stable::Tensor> grad_B, int64_t stream);

}  // namespace harlora::cuda
