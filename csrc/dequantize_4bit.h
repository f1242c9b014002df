#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace harlora {

// Fill `out` with code[nibble] * scale[index / blocksize]: float32 arithmetic, one rounding to the dtype of `out`.
//
//   packed     ((n + 1) / 2), uint8, contiguous; the even element in the high half of its byte
//   scale      (ceil(n / blocksize)), float32, contiguous
//   code       (16), float32, contiguous
//   blocksize  a power of two, 32 to 4096, so a block never begins inside a byte
//   out        n elements, contiguous; float32, bfloat16, float16 or float64

namespace cpu {
void dequantize_4bit(torch::stable::Tensor packed, torch::stable::Tensor scale, torch::stable::Tensor code,
                     int64_t blocksize, torch::stable::Tensor out);
}

namespace cuda {
void dequantize_4bit(torch::stable::Tensor packed, torch::stable::Tensor scale, torch::stable::Tensor code,
                     int64_t blocksize, torch::stable::Tensor out);
}

// Raise unless the arguments are as described above; used by every device.
inline void check_dequantize_4bit(const torch::stable::Tensor& packed, const torch::stable::Tensor& scale,
                                  const torch::stable::Tensor& code, int64_t blocksize,
                                  const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  const int64_t n = out.numel();
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0,
                  "dequantize_4bit: blocksize must be a power of two of at least 32, got ", blocksize);
  STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == (n + 1) / 2,
                  "dequantize_4bit: packed must be contiguous uint8 with one byte for two values of out");
  STD_TORCH_CHECK(scale.is_contiguous() && scale.scalar_type() == ScalarType::Float &&
                      scale.numel() == (n + blocksize - 1) / blocksize,
                  "dequantize_4bit: scale must be contiguous float32 with one value for each block");
  STD_TORCH_CHECK(code.is_contiguous() && code.scalar_type() == ScalarType::Float && code.numel() == 16,
                  "dequantize_4bit: code must be 16 contiguous float32 values");
  STD_TORCH_CHECK(out.is_contiguous(), "dequantize_4bit: out must be contiguous");
}

}  // namespace harlora
