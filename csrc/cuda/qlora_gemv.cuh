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

constexpr int kWarps = 16;
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

// What follows is of qlora_gemv.cu alone. There a warp takes two units at a time, a piece, each of 16 rows by a step:
// for few tokens two steps of a tile of 16 rows, for more a step of a tile of 32, which halves what x takes. Those are
// 1 KiB of codes either way, which it copies to shared memory, with x, two pieces at a time.

constexpr int kUnits = 2;
constexpr int kStages = 2;  // pieces of a warp

HARLORA_HOST_DEVICE constexpr int steps_of_piece(int tiles) { return kUnits / tiles; }

// Of x, in a piece.
HARLORA_HOST_DEVICE constexpr int token_bytes(int tiles) { return 2 * kStep * steps_of_piece(tiles); }

// The table there has its 32 copies of a pair at each second 128 bytes, so that one permute makes a pair's place; the
// other halves have the codes, 2 KiB for each warp.
constexpr int kPairBytes = 256;
constexpr int kTableBytes = kPairs * kPairBytes;
constexpr int kNestedBytes = 256 * 4;
constexpr int kScaleBytes = 32 * 4;          // of a warp's piece, one of each lane
constexpr int kGroupBytes = 8 * kPairBytes;  // 8 such halves, the codes of a piece
static_assert(kPairs / kWarps == 8 * kStages);

// The tokens for which there is room in what two blocks of threads may take.
HARLORA_HOST_DEVICE constexpr int most_tokens(int tiles) { return tiles == 1 ? 3 : 8; }

// Sums of the warps have a place of their own where there is room, twice, by turns of the tiles, or go where x was.
HARLORA_HOST_DEVICE constexpr int part_bytes(int tiles, int tokens) { return 4 * kRows * tiles * tokens; }
HARLORA_HOST_DEVICE constexpr bool has_parts(int tiles) { return tiles == 1; }

HARLORA_HOST_DEVICE constexpr int shared_bytes(int tiles, int tokens, bool nested) {
  return kTableBytes + (nested ? kNestedBytes : 0) +
         kWarps * (kScaleBytes + kStages * tokens * token_bytes(tiles) +
                   (has_parts(tiles) ? 2 * part_bytes(tiles, tokens) : 0));
}

// Pieces that each warp counts for a tile: the next begins with the first stage.
HARLORA_HOST_DEVICE constexpr int rounds(int pieces) {
  return (pieces + kWarps * kStages - 1) / (kWarps * kStages) * kStages;
}

// In the table, the place in bytes of the lane's copy of what byte `which` of a word stands for; own = 4 · lane.
HARLORA_HOST_DEVICE uint32_t place_of_pair(uint32_t word, int which, uint32_t own) {
  return permuted(word, own, 0x5504 + (which << 4));
}

// In the table, the place of codes of a lane: those of row `group` of each unit, and of that and 8, are in one half,
// four times 32 bytes in an order in which neither copies nor loads of 8 bytes meet in a bank.
HARLORA_HOST_DEVICE int place_of_group(int warp, int group, int which, int unit) {
  const int order = (group & 1) << 1 | (group >> 1 & 1);
  return kPairBytes * (kPairs / kWarps * warp + group) + kPairBytes / 2 + 32 * ((2 * which + unit) ^ order);
}
HARLORA_HOST_DEVICE int place_of_codes(int warp, int lane, int which, int unit) {
  return place_of_group(warp, lane >> 2, which, unit) + 8 * (lane & 3);
}

// Where a lane copies its 16 bytes to: those of row row_of_copy + 8 · which of the tile, from 16 · chunk_of_copy.
HARLORA_HOST_DEVICE int place_of_copy(int warp, int lane, int which) {
  return place_of_group(warp, lane >> 2, which, lane >> 1 & 1) + 16 * (lane & 1);
}
HARLORA_HOST_DEVICE int row_of_copy(int tiles, int lane) {
  return (lane >> 2) + (tiles == 1 ? 0 : kRows * (lane >> 1 & 1));
}
HARLORA_HOST_DEVICE int chunk_of_copy(int tiles, int lane) { return tiles == 1 ? lane & 3 : lane & 1; }

// The place of 8 values of x in those of a piece: neighbouring tokens have them in different banks.
HARLORA_HOST_DEVICE int place_of_x(int tiles, int token, int chunk) {
  return token_bytes(tiles) * token + 16 * (chunk ^ (token & 1));
}

// The row of the tile whose scale a lane reads, and the step of the piece: the four of a group, next to each other, are
// those of both rows of two units that a lane of the group multiplies by.
HARLORA_HOST_DEVICE int row_of_scale(int tiles, int lane) {
  return (lane >> 2) + 8 * (lane >> 1 & 1) + (tiles == 1 ? 0 : kRows * (lane & 1));
}
HARLORA_HOST_DEVICE int step_of_scale(int tiles, int lane) { return tiles == 1 ? lane & 1 : 0; }

}  // namespace harlora::cuda::gemv
