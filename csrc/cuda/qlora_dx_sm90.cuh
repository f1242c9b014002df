#pragma once

#include <cstdint>

#include "host_device.h"
#include "qlora_gemm_sm90.cuh"

// Which thread does what in qlora_dx_sm90.cu.
//
// dXᵀ = Ŵᵀ·dYᵀ as in gemm_sm90.cuh: columns of the weight are the rows of wgmma, rows of the weight its k. A byte of
// codes has two neighbouring columns of one row of the weight; they are a thread's two rows of wgmma, and what it needs
// of each 16 values of k are the bytes of four rows of the weight.
namespace harlora::cuda::dx90 {

using gemm90::kGroupRows;
using gemm90::kProducts;
using gemm90::kRows;
using gemm90::kStep;

constexpr int kRowBytes = kRows / 2;    // of codes, of a row of the weight
constexpr int kHalves = kRows / 64;     // each has one scale in each row of the weight
constexpr int kScaleWarps = kStep / 32;  // a thread for each row of the weight
static_assert(kStep * kRowBytes == gemm90::kWeightBytes);

// The first of the two columns of the tile whose gradients a thread has.
HARLORA_HOST_DEVICE int column_of(int thread) {
  return (thread >> 7) * kGroupRows + (thread >> 5 & 3) * 16 + (thread >> 2 & 7) * 2;
}

// Which row of the weight a thread needs of a product, of its four in the order of the operand's values.
HARLORA_HOST_DEVICE int row_of(int thread, int product, int which) {
  return 16 * product + 8 * (which >> 1) + 2 * (thread & 3) + (which & 1);
}

// Where a byte of codes lies in the tile of a step, (64, kRows / 2): the 64-byte swizzle of a copied tile.
HARLORA_HOST_DEVICE int place_of_byte(int row, int byte) {
  return kRowBytes * row + (((byte >> 4) ^ (row >> 1 & 3)) << 4) + (byte & 15);
}

// Codes of a thread's four rows, a byte each, as those of its four pairs of values of k: of the first column of the
// first two rows, of its second column, and likewise of the last two rows.
HARLORA_HOST_DEVICE uint32_t codes_of_pairs(uint32_t rows) {
  const uint32_t first = (rows & 0x00F000F0u) | (rows >> 12 & 0x000F000Fu);
  const uint32_t second = (rows << 4 & 0x00F000F0u) | (rows >> 8 & 0x000F000Fu);
  return permuted(first, second, 0x6240);
}

// Where the scale of a row of the weight lies among those of a step, in 16-bit numbers: what a thread needs of a
// product together, of each two rows the scales and then what they lack of float32.
constexpr int kScales = 4 * kProducts * kHalves * 8;  // of a stage
HARLORA_HOST_DEVICE int place_of_scales(int half, int product, int thread) {
  return 8 * ((half * kProducts + product) * 4 + (thread & 3));
}
HARLORA_HOST_DEVICE int place_of_scale(int half, int row) {
  return place_of_scales(half, row >> 4, row >> 1) + 4 * (row >> 3 & 1) + (row & 1);
}
constexpr int kLacking = 2;  // further on

}  // namespace harlora::cuda::dx90
