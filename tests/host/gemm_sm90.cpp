// qlora_gemm_sm90.cu's arithmetic without a GPU: the threads of a block in lockstep, each with what the kernel's own
// header gives it, and wgmma as NVIDIA's PTX ISA describes it, written here from that text alone.

#include "cuda/qlora_gemm_sm90.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "values.h"

using namespace harlora::cuda;

namespace {

// The byte of shared memory that wgmma reads for a value of the second factor, K-major, with 128-byte swizzle: rows of
// 128 bytes, groups of eight of them `stride` apart ("stride dimension byte offset"), and bits 4 to 6 of the address
// exchanged by exclusive or with bits 7 to 9.
int swizzled(int begin, int stride, int column, int k) {
  const int address = begin + (column / 8) * stride + (column % 8) * 128 + 2 * k;
  return address ^ ((address >> 7 & 7) << 4);
}

// "WGMMA .m64nNk16 register fragment layout for matrix A", and D: of a thread of the warpgroup.
void wgmma_m64nNk16(const std::vector<uint32_t>& a, const std::vector<uint8_t>& shared, int begin, int columns,
                    std::vector<float>& d, bool bfloat16) {
  std::vector<float> A(64 * 16), B(16 * columns);
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < 8; ++i) {
      const int row = 16 * warp + lane / 4 + ((i < 2 || (4 <= i && i < 6)) ? 0 : 8);
      const int column = i < 4 ? (lane % 4) * 2 + (i & 1) : (lane % 4) * 2 + (i & 1) + 8;
      A[row * 16 + column] = value_of(half_of(a[thread * 4 + i / 2], i % 2), bfloat16);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < columns; ++column) {
      uint16_t bits;
      std::memcpy(&bits, &shared[swizzled(begin, 1024, column, k)], 2);
      B[k * columns + column] = value_of(bits, bfloat16);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < columns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + (lane % 4) * 2 + (i & 1);
      for (int k = 0; k < 16; ++k) d[thread * columns / 2 + i] += A[row * 16 + k] * B[k * columns + column];
    }
  }
}

}  // namespace

extern "C" {

// x·Ŵᵀ for one tile of tokens, with a scale for each row and step, in steps of 64; and how often each byte of the tile
// of codes in shared memory is written.
void gemm(const uint16_t* x, const uint8_t* packed, const float* absmax, const uint16_t* values, int bfloat16,
          int tokens, int tile, int64_t in_features, int64_t out_features, float* y, int32_t* writes) {
  using namespace gemm90;
  std::vector<uint8_t> of_x(128 * tile), of_codes(kWeightBytes);
  for (int64_t first = 0; first < out_features; first += kRows) {
    std::vector<float> total(kThreads * tile / 2);
    for (int64_t step = 0; step < in_features / kStep; ++step) {
      std::fill(of_x.begin(), of_x.end(), 0xFF);  // NaN
      for (int token = 0; token < tile; ++token) {
        for (int chunk = 0; chunk < 8; ++chunk) {
          uint16_t eight[8] = {};
          if (token < tokens) std::memcpy(eight, x + token * in_features + step * kStep + 8 * chunk, 16);
          std::memcpy(&of_x[place_of_x(token, chunk)], eight, 16);
        }
      }
      std::fill_n(writes, kWeightBytes, 0);
      for (int row = 0; row < kRows; ++row) {
        for (int chunk = 0; chunk < 2; ++chunk) {
          const int64_t of = std::min(first + row, out_features - 1);
          const int place = place_of_codes(row, chunk);
          std::memcpy(&of_codes[place], packed + (of * in_features + step * kStep) / 2 + 16 * chunk, 16);
          for (int i = 0; i < 16; ++i) ++writes[place + i];
        }
      }
      for (int group = 0; group < 2; ++group) {
        std::vector<float> sums(128 * tile / 2);
        for (int product = 0; product < kProducts; ++product) {
          std::vector<uint32_t> a(128 * 4);
          for (int i = 0; i < 128 * 4; ++i) {
            const int thread = 128 * group + i / 4, word = word_of(product, i % 4 / 2);
            const int place = place_of_codes(row_of(thread, i % 2), word / 4) + 4 * (word % 4) + byte_of(thread);
            a[i] = pair_of(values, of_codes[place]);
          }
          wgmma_m64nNk16(a, of_x, 32 * product, tile, sums, bfloat16);
        }
        for (int i = 0; i < 128 * tile / 2; ++i) {  // here the sum is scaled, which the kernel does to the weight
          const int thread = 128 * group + i / (tile / 2), row = row_of(thread, i % (tile / 2) >> 1 & 1);
          const int64_t of = std::min(first + row, out_features - 1);
          total[128 * group * tile / 2 + i] += absmax[of * (in_features / kStep) + step] * sums[i];
        }
      }
    }
    for (int i = 0; i < kThreads * tile / 2; ++i) {
      const int thread = i / (tile / 2), sum = i % (tile / 2);
      const int64_t row = first + row_of(thread, sum >> 1 & 1);
      const int token = token_of_sum(thread, sum);
      if (token < tokens && row < out_features) y[token * out_features + row] = total[i];
    }
  }
}

}  // extern "C"
