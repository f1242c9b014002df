// qlora_gemm_sm90.cu's and qlora_dx_sm90.cu's arithmetic without a GPU: the threads of a block in lockstep, each with what the kernel's own
// header gives it, and wgmma as NVIDIA's PTX ISA describes it, written here from that text alone.

#include "cuda/qlora_dx_sm90.cuh"
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

// dY·Ŵ likewise, of 64 values of k in a step; out_features need not be a multiple. The scale of each weight is multiplied
// in float32, from where the scales of a step lie; writes counts how often each of those places is written.
void dx(const uint16_t* grad, const uint8_t* packed, const float* absmax, const uint16_t* values, int bfloat16,
        int tokens, int tile, int64_t in_features, int64_t out_features, float* y, int32_t* writes) {
  using namespace dx90;
  using gemm90::kThreads, gemm90::kWeightBytes, gemm90::place_of_x, gemm90::token_of_sum;
  std::vector<uint8_t> of_grad(128 * tile), of_codes(kWeightBytes);
  std::vector<float> scales(kScales);
  for (int64_t first = 0; first < in_features; first += kRows) {
    std::vector<float> total(kThreads * tile / 2);
    for (int64_t step = 0; step < (out_features + kStep - 1) / kStep; ++step) {
      std::fill(of_grad.begin(), of_grad.end(), 0xFF);  // NaN
      std::fill(of_codes.begin(), of_codes.end(), 0xFF);
      std::fill_n(writes, kScales, 0);
      for (int token = 0; token < tile; ++token) {  // what a copied tile has, zeros past the matrix
        for (int k = 0; k < kStep; ++k) {
          const int64_t of = step * kStep + k;
          const uint16_t value = token < tokens && of < out_features ? grad[token * out_features + of] : 0;
          std::memcpy(&of_grad[place_of_x(token, k / 8) + 2 * (k % 8)], &value, 2);
        }
      }
      for (int row = 0; row < kStep; ++row) {
        const int64_t of = step * kStep + row;
        for (int byte = 0; byte < kRowBytes; ++byte) {
          const int64_t column = first + 2 * byte;
          const bool there = of < out_features && column < in_features;
          of_codes[place_of_byte(row, byte)] = there ? packed[(of * in_features + column) / 2] : 0;
        }
        for (int half = 0; half < kHalves; ++half) {
          const int64_t column = first + 64 * half;
          const bool there = of < out_features && column < in_features;
          for (int lacking : {0, kLacking}) {
            const int place = place_of_scale(half, row) + lacking;
            scales[place] = there && !lacking ? absmax[(of * in_features + column) / 64] : 0;
            ++writes[place];
          }
        }
      }
      for (int group = 0; group < 2; ++group) {
        for (int product = 0; product < kProducts; ++product) {
          // Each value of k on its own, since the scale, in float32, is not in the operand.
          std::vector<uint32_t> a(128 * 4);
          for (int i = 0; i < 128; ++i) {
            const int thread = 128 * group + i;
            uint32_t rows = 0;
            for (int which = 0; which < 4; ++which) {
              const int place = place_of_byte(row_of(thread, product, which), column_of(thread) / 2);
              rows |= static_cast<uint32_t>(of_codes[place]) << 8 * which;
            }
            const uint32_t codes = codes_of_pairs(rows);
            for (int which = 0; which < 4; ++which) a[4 * i + which] = pair_of(values, codes >> 8 * which & 0xFF);
          }
          for (int k = 0; k < 16; ++k) {
            auto one = a;
            for (int i = 0; i < 128; ++i) {  // the other values of k are zero; of which thread and register: the ISA's
              for (int which = 0; which < 4; ++which) {
                const int column = (i % 4) * 2 + 8 * (which >> 1);
                if (k != column && k != column + 1) one[4 * i + which] = 0;
                else one[4 * i + which] &= k == column ? 0xFFFFu : 0xFFFF0000u;
              }
            }
            std::vector<float> sums(128 * tile / 2);
            wgmma_m64nNk16(one, of_grad, 32 * product, tile, sums, bfloat16);
            // The scale that the thread which holds this k has read, by its four words of 16-bit numbers.
            const int holder = k % 8 / 2, of_pair = 4 * (k / 8) + k % 2;
            const float scale = scales[place_of_scales(group, product, holder) + of_pair];
            for (int i = 0; i < 128 * tile / 2; ++i) total[128 * group * tile / 2 + i] += scale * sums[i];
          }
        }
      }
    }
    for (int i = 0; i < kThreads * tile / 2; ++i) {
      const int thread = i / (tile / 2), sum = i % (tile / 2);
      const int64_t column = first + column_of(thread) + (sum >> 1 & 1);
      const int token = token_of_sum(thread, sum);
      if (token < tokens && column < in_features) y[token * in_features + column] = total[i];
    }
  }
}

}  // extern "C"
