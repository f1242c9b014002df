// Dequantisation on NVIDIA GPUs: one thread a byte, so neighbouring threads write neighbouring pairs.
//
// Not yet run on a card: kernels/dispatch.py offers it on request only.

#include "dequantize_4bit.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace harlora::cuda {
namespace {

template <typename T>
__device__ T round_to(float value) {
  return static_cast<T>(value);
}
template <>
__device__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}

// shift = log2(blocksize / 2): the block of a byte is its index >> shift.
template <typename T>
__global__ void dequantize_4bit_kernel(const uint8_t* __restrict__ packed, const float* __restrict__ scale,
                                       const float* __restrict__ code, int shift, int64_t n, T* __restrict__ out) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
  __syncthreads();
  const int64_t bytes = (n + 1) / 2;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += step) {
    const uint8_t byte = packed[i];
    const float s = scale[i >> shift];
    out[2 * i] = round_to<T>(table[byte >> 4] * s);
    if (2 * i + 1 < n) out[2 * i + 1] = round_to<T>(table[byte & 15] * s);
  }
}

template <typename T>
void launch(const torch::stable::Tensor& packed, const torch::stable::Tensor& scale,
            const torch::stable::Tensor& code, int64_t blocksize, const torch::stable::Tensor& out,
            cudaStream_t stream) {
  const int64_t n = out.numel();
  if (n == 0) return;
  constexpr int threads = 256;
  const int64_t grid = std::min<int64_t>(((n + 1) / 2 + threads - 1) / threads, 65535);
  int shift = 0;
  while ((int64_t{2} << shift) < blocksize) ++shift;
  dequantize_4bit_kernel<T><<<static_cast<unsigned>(grid), threads, 0, stream>>>(
      static_cast<const uint8_t*>(packed.data_ptr()), static_cast<const float*>(scale.data_ptr()),
      static_cast<const float*>(code.data_ptr()), shift, n, static_cast<T*>(out.data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "dequantize_4bit: launch failed: ", cudaGetErrorString(error));
}

void check(const torch::stable::Tensor& packed, const torch::stable::Tensor& absmax,
           const torch::stable::Tensor& code, int64_t blocksize, const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  const int64_t n = out.numel();
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0,
                  "dequantize_4bit: blocksize must be a power of two of at least 32, got ", blocksize);
  STD_TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == (n + 1) / 2,
                  "dequantize_4bit: packed must be contiguous uint8 with one byte for two values of out");
  STD_TORCH_CHECK(absmax.is_contiguous() && absmax.scalar_type() == ScalarType::Float &&
                      absmax.numel() == (n + blocksize - 1) / blocksize,
                  "dequantize_4bit: absmax must be contiguous float32 with one value for each block");
  STD_TORCH_CHECK(code.is_contiguous() && code.scalar_type() == ScalarType::Float && code.numel() == 16,
                  "dequantize_4bit: code must be 16 contiguous float32 values");
  STD_TORCH_CHECK(out.is_contiguous(), "dequantize_4bit: out must be contiguous");
}

}  // namespace

void dequantize_4bit(torch::stable::Tensor packed, torch::stable::Tensor absmax, torch::stable::Tensor code,
                     int64_t blocksize, torch::stable::Tensor out, std::optional<torch::stable::Tensor> nested_absmax,
                     std::optional<torch::stable::Tensor>, std::optional<torch::stable::Tensor>,
                     int64_t stream_handle) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!nested_absmax.has_value(), "dequantize_4bit: nested scales must be decoded before");
  check(packed, absmax, code, blocksize, out);
  torch::stable::accelerator::DeviceGuard guard(out.get_device());
  auto* stream = reinterpret_cast<cudaStream_t>(stream_handle);
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return launch<float>(packed, absmax, code, blocksize, out, stream);
    case ScalarType::Double:
      return launch<double>(packed, absmax, code, blocksize, out, stream);
    case ScalarType::BFloat16:
      return launch<__nv_bfloat16>(packed, absmax, code, blocksize, out, stream);
    case ScalarType::Half:
      return launch<__half>(packed, absmax, code, blocksize, out, stream);
    default:
      STD_TORCH_CHECK(false, "dequantize_4bit: out must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace harlora::cuda
