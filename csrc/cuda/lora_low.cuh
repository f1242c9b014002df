#pragma once

// u = scaling·dY·lora_B, in 16 bits, beside which the kernel that needs it starts. Included by .cu files alone.

#include <cstdint>

#include "host_device.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "ragged.cuh"
#include "types.cuh"

namespace harlora::cuda {

constexpr int kLowTokens = 8;  // rows of dY for a block of threads,
constexpr int kLowRanks = 16;  // and columns of lora_B
constexpr int kLowWarps = 16;  // share the steps of 32 rows of lora_B
constexpr int kLowThreads = 32 * kLowWarps;

// The columns of u: all that a block of threads writes, zeros past the rank.
HARLORA_HOST_DEVICE int64_t padded_rank(int64_t rank) { return (rank + kLowRanks - 1) / kLowRanks * kLowRanks; }

// uᵀ = lora_Bᵀ·dYᵀ: columns of lora_B are the rows of mma.sync, tokens its columns. A lane takes eight neighbouring
// values of dY, and of each of the same eight rows of lora_B two columns: those of two rows make two registers of the
// operand, one for each column, which are its rows lane / 4 and lane / 4 + 8.
template <typename T, typename Adapter>
__global__ void __launch_bounds__(kLowThreads)
    lora_low_kernel(const T* grad, const Adapter* B, T* u, int out_features, int rows, int rank, float scaling) {
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane >> 2, column = lane & 3;
  const int token = blockIdx.x * kLowTokens, first_rank = blockIdx.y * kLowRanks;
  const bool plain = out_features % 8 == 0 && rank % 2 == 0;
  const T* const of_token = grad + static_cast<int64_t>(min(token + group, rows - 1)) * out_features;
  const int ranks = rank - first_rank - 2 * group;
  const Adapter* const of_B = B + first_rank + 2 * group;
  struct Step {
    uint4 eight;      // of dY
    uint32_t two[8];  // of each row of lora_B
  };
  const auto read = [&](int first) -> Step {
    Step step;
    const int k = first + 8 * column;
    const Adapter* const from = of_B + k * static_cast<int64_t>(rank);
    const auto all = [&]<bool kPlain>() {  // one branch for all, so that all are on their way at once
      step.eight = eight_or_zeros<kPlain>(of_token + k, out_features - k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        step.two[i] = two_or_zeros<kPlain, T>(from + i * rank, k + i < out_features ? ranks : 0);
      }
    };
    if (plain) {
      all.template operator()<true>();
    } else {
      all.template operator()<false>();
    }
    return step;
  };
  float sums[4] = {};
  Step next = read(32 * warp);
  for (int first = 32 * warp; first < out_features; first += 32 * kLowWarps) {
    const Step now = next;
    next = read(first + 32 * kLowWarps);  // zeros past the last row
    const uint32_t tokens[2][2] = {{now.eight.x, now.eight.y}, {now.eight.z, now.eight.w}};
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      const uint32_t* const of = now.two + 4 * product;
      multiply_add<T>(sums, {firsts(of[0], of[1]), seconds(of[0], of[1]), firsts(of[2], of[3]), seconds(of[2], of[3])},
                      tokens[product]);
    }
  }
  __shared__ float parts[kLowWarps][kLowTokens * kLowRanks];
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][(2 * column + (i & 1)) * kLowRanks + 2 * group + (i >> 1)] = sums[i];
  __syncthreads();
  if (threadIdx.x >= kLowTokens * kLowRanks) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLowWarps; ++i) sum += parts[i][threadIdx.x];
  const int row = token + threadIdx.x / kLowRanks;
  if (row < rows) u[row * padded_rank(rank) + first_rank + threadIdx.x % kLowRanks] = rounded<T>(scaling * sum);
}

template <typename T>
void lora_low(const char* name, const T* grad, const void* B, bool wide, T* u, int out_features, int rows, int rank,
              float scaling, cudaStream_t stream) {
  const dim3 grid((rows + kLowTokens - 1) / kLowTokens, static_cast<unsigned>(padded_rank(rank) / kLowRanks));
  if (wide) {
    launch_kernel(name, lora_low_kernel<T, float>, {grid, kLowThreads, stream}, grad, static_cast<const float*>(B), u,
                  out_features, rows, rank, scaling);
  } else {
    launch_kernel(name, lora_low_kernel<T, T>, {grid, kLowThreads, stream}, grad, static_cast<const T*>(B), u,
                  out_features, rows, rank, scaling);
  }
}

}  // namespace harlora::cuda
