#pragma once

#include <cstdint>

#include "host_device.h"
#include "nf4.cuh"

// Which lane does what in qlora_gemv.cu; qlora_gemm.cu has its steps in common.
//
// A block of threads computes 16 or 32 columns of y at a time for up to 8 rows of x ("tokens"): yᵀ = Ŵ·xᵀ with rows of
// the weight as the 16 rows of mma.sync and tokens as its 8 columns, so that one decoded weight serves all tokens and
// its operand is made in registers. Its warps share out the steps of 64 along k, and their sums are added in their
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

// The operand of a product from the 8 bytes of each of the two rows; pair_of has the pair of a byte of a word.
template <typename PairOf>
HARLORA_HOST_DEVICE void operand_of_pairs(const PairOf& pair_of, const uint32_t (&first)[2],
                                          const uint32_t (&second)[2], int product, uint32_t (&a)[4]) {
  const int word = product >> 1, byte = 2 * (product & 1);
  a[0] = pair_of(first[word], byte);
  a[1] = pair_of(second[word], byte);
  a[2] = pair_of(first[word], byte + 1);
  a[3] = pair_of(second[word], byte + 1);
}

// The same where pair_at has the pairs of the table by place.
template <typename PairAt>
HARLORA_HOST_DEVICE void weight_operand(const PairAt& pair_at, const uint32_t (&first)[2], const uint32_t (&second)[2],
                                        int product, uint32_t (&a)[4]) {
  const auto pair_of = [&](uint32_t word, int which) { return pair_at(pair_place(word, which)); };
  operand_of_pairs(pair_of, first, second, product, a);
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

// The token of one of a lane's sums; its row is row_of(lane, which >> 1).
HARLORA_HOST_DEVICE int token_of_sum(int lane, int which) { return 2 * (lane & 3) + (which & 1); }

// What follows is of qlora_gemv.cu alone. There a warp takes two steps at a time, a piece, of 16 or 32 rows: of each
// row 64 bytes of codes, of each token 256 of x, which it copies to shared memory some pieces ahead.

constexpr int kSteps = 2;
constexpr int kCopyCodes = 32;    // that 16 bytes hold
constexpr int kTokenBytes = 256;  // of x

// The table there has its 32 copies of a pair at each second 128 bytes, so that one permute makes a pair's place; the
// other halves have the codes, 4 KiB for each warp.
constexpr int kPairBytes = 256;
constexpr int kTableBytes = kPairs * kPairBytes;
constexpr int kNestedBytes = 256 * 4;
constexpr int kGroupBytes = 8 * kPairBytes;  // 8 such halves, the codes of a tile of 16 rows

// Pieces of a warp, by the tiles of 16 rows.
HARLORA_HOST_DEVICE constexpr int stages(int tiles) { return kPairs / kWarps / (8 * tiles); }

// The tokens whose x is as large as the codes may be, so that two blocks of threads fit.
HARLORA_HOST_DEVICE constexpr int most_tokens(int tiles) { return 4 * tiles; }

HARLORA_HOST_DEVICE constexpr int shared_bytes(int tiles, int tokens, bool nested) {
  return kTableBytes + (nested ? kNestedBytes : 0) + kWarps * stages(tiles) * tokens * kTokenBytes;
}

// Pieces that each warp counts for a tile: the next begins with the first stage.
HARLORA_HOST_DEVICE constexpr int rounds(int pieces, int stages) {
  return (pieces + kWarps * stages - 1) / (kWarps * stages) * stages;
}

// In the table, the place in bytes of the lane's copy of what byte `which` of a word stands for; own = 4 · lane.
HARLORA_HOST_DEVICE uint32_t place_of_pair(uint32_t word, int which, uint32_t own) {
  return permuted(word, own, 0x5504 + (which << 4));
}

// In the table, the place of codes of a lane: those of row `group` of a tile, or of that and 8, are in one half, four
// times 32 bytes by row and step in an order in which neither copies nor loads of 8 bytes meet in a bank.
HARLORA_HOST_DEVICE int place_of_group(int warp, int group, int which, int step) {
  const int order = (group & 1) << 1 | (group >> 1 & 1);
  return kPairBytes * (kPairs / kWarps * warp + group) + kPairBytes / 2 + 32 * ((2 * which + step) ^ order);
}
HARLORA_HOST_DEVICE int place_of_codes(int warp, int lane, int which, int step) {
  return place_of_group(warp, lane >> 2, which, step) + 8 * (lane & 3);
}

// Where a lane copies its 16 bytes to: those of rows lane / 4 + 8 · i of a piece.
HARLORA_HOST_DEVICE int place_of_copy(int warp, int tiles, int stage, int lane, int i) {
  return place_of_group(warp, lane >> 2, i & 1, lane >> 1 & 1) + 16 * (lane & 1) +
         kGroupBytes * (stage * tiles + (i >> 1));
}

// The place of 8 values of x in those of a piece: neighbouring tokens have them in different banks.
HARLORA_HOST_DEVICE int place_of_x(int token, int chunk) { return kTokenBytes * token + 16 * (chunk ^ (token & 1)); }

// The row whose scale a lane reads, from its first, and the step.
HARLORA_HOST_DEVICE int rows_to_scale(int lane) { return 8 * (lane >> 1 & 1); }
HARLORA_HOST_DEVICE int step_of_scale(int lane) { return lane & 1; }

}  // namespace harlora::cuda::gemv
