// Dequantisation on the CPU: blocks are independent and shared out over torch's threads.

#include "../dequantize_4bit.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

namespace harlora::cpu {
namespace {

template <typename T>
void dequantize(const uint8_t* packed, const float* scale, const float* code, int64_t blocksize, int64_t n, T* out) {
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  // For fewer than 8192 values no other thread is woken.
  const int64_t grain = std::max<int64_t>(1, 8192 / blocksize);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float table[16];
      for (int i = 0; i < 16; ++i) table[i] = code[i] * scale[block];  // the same product as per value, 16 times
      const int64_t start = block * blocksize;
      const int64_t stop = std::min(n, start + blocksize);
      int64_t i = start;
      for (; i + 1 < stop; i += 2) {
        const uint8_t byte = packed[i / 2];
        out[i] = static_cast<T>(table[byte >> 4]);
        out[i + 1] = static_cast<T>(table[byte & 15]);
      }
      if (i < stop) out[i] = static_cast<T>(table[packed[i / 2] >> 4]);
    }
  });
}

}  // namespace

void dequantize_4bit(torch::stable::Tensor packed, torch::stable::Tensor scale, torch::stable::Tensor code,
                     int64_t blocksize, torch::stable::Tensor out) {
  using torch::headeronly::ScalarType;
  check_dequantize_4bit(packed, scale, code, blocksize, out);
  const auto* bytes = static_cast<const uint8_t*>(packed.data_ptr());
  const auto* scales = static_cast<const float*>(scale.data_ptr());
  const auto* codes = static_cast<const float*>(code.data_ptr());
  const int64_t n = out.numel();
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return dequantize(bytes, scales, codes, blocksize, n, static_cast<float*>(out.data_ptr()));
    case ScalarType::Double:
      return dequantize(bytes, scales, codes, blocksize, n, static_cast<double*>(out.data_ptr()));
    case ScalarType::BFloat16:
      return dequantize(bytes, scales, codes, blocksize, n, static_cast<torch::headeronly::BFloat16*>(out.data_ptr()));
    case ScalarType::Half:
      return dequantize(bytes, scales, codes, blocksize, n, static_cast<torch::headeronly::Half*>(out.data_ptr()));
    default:
      STD_TORCH_CHECK(false, "dequantize_4bit: out must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace harlora::cpu
