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

// Likewise the address of the pair, in one instruction: `copy` is that of the lane's copy of the first, `which` from
// pair_of_byte, which may be known late.
HARLORA_HOST_DEVICE uint32_t pair_of_byte(int which) { return static_cast<uint32_t>(4 * kPairCopies) << 8 * which; }
#ifdef __CUDACC__
__device__ __forceinline__ uint32_t pair_address(uint32_t word, uint32_t which, uint32_t copy) {
  return __dp4a(word, which, copy);  // the sum of products of bytes
}
#endif

// What a byte stands for, from the 16-bit patterns of the 16 code values.
HARLORA_HOST_DEVICE uint32_t pair_of(const uint16_t* values, uint32_t byte) {
  return values[byte >> 4] | static_cast<uint32_t>(values[byte & 15]) << 16;
}

#ifdef __CUDACC__
// The table, by so many threads, from the 16-bit patterns of the 16 code values.
template <int kThreads>
__device__ __forceinline__ void write_pairs(uint32_t* table, const uint16_t* values, int thread) {
  for (int i = thread; i < kPairWords / 4; i += kThreads) {
    const uint32_t pair = pair_of(values, i / (kPairCopies / 4));
    reinterpret_cast<uint4*>(table)[i] = {pair, pair, pair, pair};
  }
}
#endif

// The same without a table in memory: the low and the high bytes of the 16 code values in four registers each, of which
// permutes take what a word of codes names. Eleven instructions for two bytes where the table takes six, two of which
// go to shared memory: for kernels that ask more of that than of arithmetic.
struct Planes {
  uint32_t low[4], high[4];

  // From the 16-bit patterns of the code values.
  HARLORA_HOST_DEVICE explicit Planes(const uint16_t* values) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = values[4 * i] | static_cast<uint32_t>(values[4 * i + 1]) << 16;
      const uint32_t second = values[4 * i + 2] | static_cast<uint32_t>(values[4 * i + 3]) << 16;
      low[i] = permuted(first, second, 0x6420);
      high[i] = permuted(first, second, 0x7531);
    }
  }

  // What the four bytes of a word stand for, each as pair_of has it.
  HARLORA_HOST_DEVICE void pairs(uint32_t word, uint32_t (&found)[4]) const {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int half = 0; half < 2; ++half) {
      const uint32_t codes = word >> 16 * half;
      const uint32_t of_eight = codes & 0x7777;                   // a code's last three bits, in its half of the values
      const uint32_t of_halves = (codes >> 1 & 0x4444) | 0x3210;  // and its first, which half
      const uint32_t lows = permuted(permuted(low[0], low[1], of_eight), permuted(low[2], low[3], of_eight), of_halves);
      const uint32_t highs =
          permuted(permuted(high[0], high[1], of_eight), permuted(high[2], high[3], of_eight), of_halves);
      found[2 * half] = permuted(lows, highs, 0x4051);  // of a byte the high nibble is the even element
      found[2 * half + 1] = permuted(lows, highs, 0x6273);
    }
  }
};

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
