#pragma once

// Values of matrices whose rows may begin anywhere and end in the middle of what is read at once. Included by .cu files
// alone.

#include <cstdint>

#include "host_device.h"
#include "types.cuh"

namespace harlora::cuda {

// Eight values in a row, two in a word, zeros for those past the first `there`. kWhole: they begin at a multiple of 16
// bytes and are there all or none.
template <bool kWhole, typename T>
__device__ __forceinline__ uint4 eight_or_zeros(const T* from, int there) {
  if (there <= 0) return {0, 0, 0, 0};
  if constexpr (kWhole) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    uint16_t each[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) each[i] = i < there ? pattern(from[i]) : uint16_t{0};
    const auto word = [&](int i) { return each[2 * i] | static_cast<uint32_t>(each[2 * i + 1]) << 16; };
    return {word(0), word(1), word(2), word(3)};
  }
}

// Two values in a row likewise, kWhole at a multiple of 4 bytes; of float32, rounded to T, at one of 8.
template <bool kWhole, typename T>
__device__ __forceinline__ uint32_t two_or_zeros(const T* from, int there) {
  if (there <= 0) return 0;
  if constexpr (kWhole) {
    return *reinterpret_cast<const uint32_t*>(from);
  } else {
    return pattern(from[0]) | (there > 1 ? static_cast<uint32_t>(pattern(from[1])) << 16 : 0);
  }
}
template <bool kWhole, typename T>
__device__ __forceinline__ uint32_t two_or_zeros(const float* from, int there) {
  if (there <= 0) return 0;
  if constexpr (kWhole) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    return packed_pair(two.x, two.y, T{});
  } else {
    return packed_pair(from[0], there > 1 ? from[1] : 0.0f, T{});
  }
}

// The first and the second values of two pairs.
__device__ __forceinline__ uint32_t firsts(uint32_t one, uint32_t other) { return permuted(one, other, 0x5410); }
__device__ __forceinline__ uint32_t seconds(uint32_t one, uint32_t other) { return permuted(one, other, 0x7632); }

}  // namespace harlora::cuda
