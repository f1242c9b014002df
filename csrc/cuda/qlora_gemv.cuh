#pragma once

#include <cstdint>

#include "host_device.h"
#include "nf4.cuh"

// Which lane does what in qlora_gemv.cu; qlora_gemm.cu has its steps in common.
//
// A block of threads computes 16 columns of y for up to 8 rows of x ("tokens"): yᵀ = Ŵ·xᵀ with rows of the weight as
// the 16 rows of mma.sync and tokens as its 8 columns, so that one decoded weight serves all tokens and its operand is
// made in registers. Its warps share out the steps of 64 along k, one after the other, and their sums are added in that
// order.
//
// The order of k within a step is free, as long as both factors have the same: here a lane takes 16 values of k in a
// row, which are 8 bytes of packed codes and 32 bytes of x, and four products take four of them each.
namespace harlora::cuda::gemv {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;   // of the weight, for a block of threads
constexpr int kTokens = 8;  // at most
constexpr int kStep = 64;   // values of k; a scale holds for all of them
constexpr int kProducts = 4;
constexpr int kLaneValues = 16;

// The row of the tile whose codes a lane reads, the first or the second of its two.
HARLORA_HOST_DEVICE int row_of(int lane, int which) { return (lane >> 2) + 8 * which; }

// The token whose x a lane reads.
HARLORA_HOST_DEVICE int token_of(int lane) { return lane >> 2; }

// The first of the values of k that a lane reads in a step.
HARLORA_HOST_DEVICE int first_k(int lane) { return kLaneValues * (lane & 3); }

// The operand of a product from the 8 bytes of each of the two rows; pair_at has the pairs of the table by place.
template <typename PairAt>
HARLORA_HOST_DEVICE void weight_operand(const PairAt& pair_at, const uint32_t (&first)[2], const uint32_t (&second)[2],
                                        int product, uint32_t (&a)[4]) {
  const int word = product >> 1, byte = 2 * (product & 1);
  a[0] = pair_at(pair_place(first[word], byte));
  a[1] = pair_at(pair_place(second[word], byte));
  a[2] = pair_at(pair_place(first[word], byte + 1));
  a[3] = pair_at(pair_place(second[word], byte + 1));
}

// The operand of a product from the 16 values of x, two in a word.
HARLORA_HOST_DEVICE void token_operand(const uint32_t (&x)[8], int product, uint32_t (&b)[2]) {
  b[0] = x[2 * product];
  b[1] = x[2 * product + 1];
}

// Sums of a step into those of the lane, each row by its scale.
HARLORA_HOST_DEVICE void add_scaled(float (&total)[4], const float (&sums)[4], float first, float second) {
  total[0] += first * sums[0];
  total[1] += first * sums[1];
  total[2] += second * sums[2];
  total[3] += second * sums[3];
}

// Where a lane's sums lie in those of the tile, (kTokens, kRows).
HARLORA_HOST_DEVICE int place_of_sum(int lane, int which) {
  const int row = (lane >> 2) + 8 * (which >> 1), token = 2 * (lane & 3) + (which & 1);
  return token * kRows + row;
}

}  // namespace harlora::cuda::gemv
