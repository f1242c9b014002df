#pragma once

#include <cstdint>

// What a kernel decides by arithmetic alone (places, layouts, decoding) is written once, in headers that also compile
// without nvcc: tests/host/ runs it for every lane on a machine without a GPU.
#ifdef __CUDACC__
#define HARLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HARLORA_HOST_DEVICE inline
#endif

namespace harlora::cuda {

// prmt: a word of four bytes of the eight of two words, each named by the low three bits of a nibble of `which`.
HARLORA_HOST_DEVICE uint32_t permuted(uint32_t low, uint32_t high, uint32_t which) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, which);
#else
  const uint64_t eight = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(eight >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
#endif
}

}  // namespace harlora::cuda
