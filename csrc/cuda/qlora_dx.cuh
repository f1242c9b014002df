#pragma once

#include <cstdint>

#include "host_device.h"
#include "nf4.cuh"

// Which lane does what in qlora_dx.cu.
//
// A block of threads computes kColumns columns of dX for a tile of rows of dY ("tokens"): dXᵀ = Ŵᵀ·dYᵀ with columns of
// the weight as the 16 rows of mma.sync, tokens as its 8 columns, and the sum over rows of the weight. Of each step a
// warp has a group of columns, for all tokens, and a slice of 16 rows; the sums of the slices are added at the end.
//
// The order of the columns is free, as long as each sum is written to its place, and that of the rows within a step, as
// long as both factors have the same. With g = lane / 4 and i = lane % 4 a lane takes the rows 4i to 4i + 3 of each 16,
// which are 8 bytes of dY, and of each the bytes of codes that are the g-th of its group:
//
//   64 columns in a group    4 bytes, one for each of 4 products
//   32 columns               2 bytes, 2 products
//
// The columns of a byte are the rows g and g + 8 of its product.
namespace harlora::cuda::dx {

constexpr int kColumns = 128;  // of the weight, for a block of threads
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kHalves = kColumns / 64;  // each has one scale in each row

// What depends on the tokens of a tile: with many, sums take the registers that wider groups of columns would.
template <int kTile>
struct Shape {
  static constexpr int kGroups = kTile == 128 ? 4 : 2;  // of columns
  static constexpr int kSlices = kWarps / kGroups;      // of the rows of a step
  static constexpr int kGroupColumns = kColumns / kGroups;
  static constexpr int kProducts = kGroupColumns / 16;  // of a group, each with all tokens, in a step
  static constexpr int kStep = 16 * kSlices;            // rows of the weight
  static constexpr int kChunks = kStep / 8;             // of 16 bytes of dY of a token
  static constexpr int kGradBytes = 2 * kTile * kStep;
  static constexpr int kCodesBytes = kStep * kColumns / 2;
  static constexpr int kStages = kTile == 32 || kTile == 64 ? 5 : 6;
  static constexpr int kScales = 2 * kHalves * kStep;   // 16-bit numbers
};

// The rows of a step lie in another order in shared memory, so that what the lanes of a warp read at once, the same
// bytes of four rows 4 apart, is in different banks; row_of_slot is its inverse.
HARLORA_HOST_DEVICE int slot_of_row(int row) { return (row & 0x30) | (row & 7) << 1 | (row >> 3 & 1); }
HARLORA_HOST_DEVICE int row_of_slot(int slot) { return (slot & 0x30) | (slot & 1) << 3 | (slot >> 1 & 7); }

// Where 16 bytes of codes of the tile of a step lie, (kStep, kColumns / 2).
HARLORA_HOST_DEVICE int place_of_codes(int slot, int chunk) { return 64 * slot + ((chunk ^ (slot >> 2 & 2)) << 4); }

// Where 16 bytes of dY lie in the tile of a step, (kTile, kStep): the four tokens of which half a warp reads 32 bytes
// are in different banks.
template <int kChunks>
HARLORA_HOST_DEVICE int place_of_grad(int token, int chunk) {
  const int with = kChunks == 8 ? (token & 3) << 1 : token & 2;
  return 16 * (kChunks * token + (chunk ^ with));
}

// Where the scale of a row lies among those of a step, in 16-bit numbers: those of four rows in a row, which a lane
// reads at once, and four further on what they lack of a float32.
template <int kStep>
HARLORA_HOST_DEVICE int place_of_scale(int half, int row) {
  return 8 * (half * (kStep / 4) + (row >> 2)) + (row & 3);
}

// Where the bytes begin that a lane takes of the first of its four rows; those of the next row lie kNextRow further on.
constexpr int kNextRow = 128;
template <int kTile>
HARLORA_HOST_DEVICE int place_of_lane_codes(int group, int slice, int lane) {
  using S = Shape<kTile>;
  const int byte = group * (S::kGroupColumns / 2) + S::kProducts * (lane >> 2);
  return place_of_codes(slot_of_row(16 * slice + 4 * (lane & 3)), byte >> 4) + (byte & 15);
}

// Where the four values of dY begin that a lane takes of the first of its tokens; those of the token 8 later lie
// 128 · kChunks further on.
template <int kTile>
HARLORA_HOST_DEVICE int place_of_lane_grad(int slice, int lane) {
  return place_of_grad<Shape<kTile>::kChunks>(lane >> 2, 2 * slice + (lane >> 1 & 1)) + 8 * (lane & 1);
}

// The first of the columns of a group whose sums a lane has; those of a product are two neighbours.
template <int kTile>
HARLORA_HOST_DEVICE int first_column_of_lane(int lane) { return 2 * Shape<kTile>::kProducts * (lane >> 2); }

// Codes of one column after the other, of two rows: in each byte the codes of the first and of the second row, of the
// even columns of `one` and `other`, or the odd ones.
HARLORA_HOST_DEVICE uint32_t even_columns(uint32_t one, uint32_t other) {
  return (((other >> 4) ^ one) & 0x0F0F0F0Fu) ^ one;  // one instruction chooses the bits
}
HARLORA_HOST_DEVICE uint32_t odd_columns(uint32_t one, uint32_t other) {
  return (((one << 4) ^ other) & 0xF0F0F0F0u) ^ other;
}

}  // namespace harlora::cuda::dx
