#pragma once

#include <cstdint>

#include "host_device.h"

// Decoding of 4-bit codes, both of a byte at once: the even element is in the high half. NF4 and FP4 differ by the
// table of code values alone, which comes from kernels/format.py.
namespace harlora::cuda {

// A table in shared memory of what each byte stands for, two 16-bit values in the order of their elements, once for
// each of the 32 banks: lanes that look up different bytes never wait for each other.
constexpr int kPairs = 256;
constexpr int kPairCopies = 32;
constexpr int kPairWords = kPairs * kPairCopies;

// Where in the table the pair of byte `which` of a word is, in bytes from the lane's copy of the first.
HARLORA_HOST_DEVICE uint32_t pair_place(uint32_t word, int which) {
#ifdef __CUDA_ARCH__
  const uint32_t byte = __byte_perm(word, 0, 0x4440 + which);  // of a shift and a mask the compiler makes three steps
#else
  const uint32_t byte = word >> (8 * which) & 0xFFu;
#endif
  return byte * static_cast<uint32_t>(4 * kPairCopies);
}

// What a byte stands for, from the 16-bit patterns of the 16 code values.
HARLORA_HOST_DEVICE uint32_t pair_of(const uint16_t* values, uint32_t byte) {
  return values[byte >> 4] | static_cast<uint32_t>(values[byte & 15]) << 16;
}

// A scale that is itself quantised: its code's value times the scale of 256 scales, and the offset of all. Two
// roundings, as the format says.
HARLORA_HOST_DEVICE float nested_scale(float code, float scale, float offset) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(code, scale), offset);
#else
  const volatile float product = code * scale;  // no contraction
  return product + offset;
#endif
}

}  // namespace harlora::cuda
