#pragma once

// The 16-bit types that kernels are written for. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace harlora::cuda {

template <typename T>
__device__ __forceinline__ T rounded(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 rounded(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half rounded(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ uint16_t pattern(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
__device__ __forceinline__ uint16_t pattern(__half value) { return __half_as_ushort(value); }

__device__ __forceinline__ float2 unpacked(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ __forceinline__ float2 unpacked(uint32_t pair, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

__device__ __forceinline__ uint32_t packed_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t packed_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// So that two weights times their scale take two instructions the scale is two 16-bit numbers, the second of which is
// what the first lacks. Past the range of float16 the largest weight of a block is infinite whatever is done.
__device__ __forceinline__ void split(float scale, __nv_bfloat16& high, __nv_bfloat16& low) {
  high = rounded<__nv_bfloat16>(scale);
  const float rest = scale - static_cast<float>(high);
  low = rounded<__nv_bfloat16>(rest == rest ? rest : 0.0f);  // not so if the scale is infinite
}
__device__ __forceinline__ void split(float scale, __half& high, __half& low) {
  constexpr float most = 65504;
  const bool finite = scale - scale == 0;
  high = rounded<__half>(finite ? fminf(fmaxf(scale, -most), most) : scale);
  const float rest = scale - static_cast<float>(high);
  low = rounded<__half>(finite ? fminf(fmaxf(rest, -most), most) : 0.0f);
}

// Of each of the two, value · high + value · low, rounded once but for the second product.
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, uint32_t high, uint32_t low, __nv_bfloat16) {
  const auto of = [](const uint32_t& word) { return reinterpret_cast<const __nv_bfloat162&>(word); };
  const __nv_bfloat162 result = __hfma2(of(pair), of(high), __hmul2(of(pair), of(low)));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, uint32_t high, uint32_t low, __half) {
  const auto of = [](const uint32_t& word) { return reinterpret_cast<const __half2&>(word); };
  const __half2 result = __hfma2(of(pair), of(high), __hmul2(of(pair), of(low)));
  return reinterpret_cast<const uint32_t&>(result);
}

}  // namespace harlora::cuda
