// qlora_gemv.cu's arithmetic without a GPU: 32 lanes in lockstep, each with what the kernel's own headers give it, and
// mma.sync as NVIDIA's PTX ISA describes it, written here from that text alone.

#include "cuda/qlora_gemv.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "values.h"

using namespace harlora::cuda;

namespace {

// "Matrix Fragments for mma.m16n8k16": a0..a7, b0..b3 and c0..c3 of the lane whose groupID is lane >> 2 and whose
// threadID_in_group is lane % 4.
void mma_m16n8k16(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&c)[32][4], bool bfloat16) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
      const int column = i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
      A[row][column] = value_of(half_of(a[lane][i / 2], i % 2), bfloat16);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
      B[row][group] = value_of(half_of(b[lane][i / 2], i % 2), bfloat16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane % 4) * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) c[lane][i] += A[row][k] * B[k][column];
    }
  }
}

}  // namespace

extern "C" {

// The place of each byte in the table of pairs, for each byte of a word, and what it holds there.
void pairs(const uint16_t* values, int32_t* places, uint32_t* found) {
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (int which = 0; which < 4; ++which) {
      const uint32_t others = 0xA5C3960Fu & ~(0xFFu << (8 * which));  // of which none may matter
      *places++ = static_cast<int32_t>(pair_place(byte << (8 * which) | others, which));
    }
    *found++ = pair_of(values, byte);
  }
}

// x·Ŵᵀ, and how often each byte of the weight is read.
void gemv(const uint16_t* x, const uint8_t* packed, const float* absmax, const uint16_t* values, int bfloat16,
          int tokens, int64_t in_features, int64_t out_features, int64_t blocksize, float* y, int32_t* reads) {
  using namespace gemv;
  std::vector<uint32_t> table(kPairWords);
  for (int i = 0; i < kPairWords; ++i) table[i] = pair_of(values, i / kPairCopies);
  const int64_t steps = in_features / kStep;
  for (int64_t first_row = 0; first_row < out_features; first_row += kRows) {
    float parts[kWarps][kTokens * kRows];
    std::fill_n(&parts[0][0], kWarps * kTokens * kRows, 0.0f / 0.0f);
    for (int warp = 0; warp < kWarps; ++warp) {
      float total[32][4] = {};
      for (int64_t step = warp; step < steps; step += kWarps) {
        float sums[32][4] = {}, scales[32][2];
        uint32_t codes[32][2][2], of_x[32][8] = {};
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 2; ++i) {
            const int64_t row = std::min(first_row + row_of(lane, i), out_features - 1);
            const int64_t byte = (row * in_features + first_k(lane) + step * kStep) / 2;
            std::memcpy(codes[lane][i], packed + byte, 8);
            scales[lane][i] = absmax[(row * in_features + step * kStep) / blocksize];
            if (first_row + row_of(lane, i) < out_features) {
              for (int each = 0; each < 8; ++each) ++reads[byte + each];
            }
          }
          const int token = token_of(lane);
          if (token < tokens) std::memcpy(of_x[lane], x + token * in_features + first_k(lane) + step * kStep, 32);
        }
        for (int product = 0; product < kProducts; ++product) {
          uint32_t a[32][4], b[32][2];
          for (int lane = 0; lane < 32; ++lane) {
            const auto pair_at = [&](uint32_t place) { return table[place / 4 + lane]; };
            weight_operand(pair_at, codes[lane][0], codes[lane][1], product, a[lane]);
            token_operand(of_x[lane], product, b[lane]);
          }
          mma_m16n8k16(a, b, sums, bfloat16);
        }
        for (int lane = 0; lane < 32; ++lane) add_scaled(total[lane], sums[lane], scales[lane][0], scales[lane][1]);
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) parts[warp][place_of_sum(lane, i)] = total[lane][i];
      }
    }
    for (int thread = 0; thread < kTokens * kRows; ++thread) {
      const int64_t row = first_row + thread % kRows;
      const int token = thread / kRows;
      if (token >= tokens || row >= out_features) continue;
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp][thread];
      y[token * out_features + row] = sum;
    }
  }
}
}
