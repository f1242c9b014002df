#pragma once

#include <cstdint>

#include "host_device.h"
#include "nf4.cuh"

// Which thread does what in qlora_gemm_sm90.cu.
//
// A block of threads computes kRows columns of y for a tile of rows of x ("tokens"): yᵀ = Ŵ·xᵀ, rows of the weight
// being the rows of wgmma, which takes them from registers, and tokens its columns, which it reads from shared memory.
// Each of its two warpgroups has 64 rows of the weight; both read the same x.
namespace harlora::cuda::gemm90 {

constexpr int kRows = 128;  // of the weight, for a block of threads
constexpr int kGroupRows = 64;
constexpr int kThreads = 256;
constexpr int kStep = 64;  // values of k; a scale holds for all of them
constexpr int kProducts = kStep / 16;
constexpr int kWeightBytes = kRows * kStep / 2;

// Where 16 bytes of x lie in the tile of a step, (tokens, 64): the order that wgmma calls the 128-byte swizzle.
HARLORA_HOST_DEVICE int place_of_x(int token, int chunk) { return 128 * token + ((chunk ^ (token & 7)) << 4); }

// Where 16 bytes of codes lie in the tile of a step, (kRows, 64 / 2): the eight rows that a warp reads at once are in
// different banks.
HARLORA_HOST_DEVICE int place_of_codes(int row, int chunk) { return 32 * row + ((chunk ^ (row >> 2 & 1)) << 4); }
constexpr int kNextCodes = 32 * 8;  // from those of a thread's first row to those of its second

// The row of the tile that a thread decodes, the first or the second of its two.
HARLORA_HOST_DEVICE int row_of(int thread, int which) {
  return (thread >> 7) * kGroupRows + (thread >> 5 & 3) * 16 + (thread >> 2 & 7) + 8 * which;
}

// Of each word of codes, 8 values of k, a thread decodes the byte of this number.
HARLORA_HOST_DEVICE int byte_of(int thread) { return thread & 3; }

// The words of a row whose byte is the first or the last two values of k of a product's operand.
HARLORA_HOST_DEVICE int word_of(int product, int half) { return 2 * product + half; }

// The token of the tile that a thread's sum is for; its row is row_of(thread, sum >> 1 & 1).
HARLORA_HOST_DEVICE int token_of_sum(int thread, int sum) { return 8 * (sum >> 2) + 2 * (thread & 3) + (sum & 1); }

}  // namespace harlora::cuda::gemm90
