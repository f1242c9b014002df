#pragma once

// t = x·lora_Aᵀ, in 16 bits, beside which the kernel that needs it starts. Included by .cu files alone.

#include <cstdint>

#include "launch.cuh"
#include "ptx.cuh"
#include "types.cuh"

namespace harlora::cuda {

constexpr int kDownTokens = 16;  // rows of x for a block of threads,
constexpr int kDownRanks = 8;    // and rows of lora_A
constexpr int kDownWarps = 16;   // share the steps of 64 along k
constexpr int kDownThreads = 32 * kDownWarps;

// Eight values of an adapter, two in a word; float32 is rounded.
template <typename T, bool kWide>
__device__ __forceinline__ uint4 eight(const void* from, int64_t place) {
  if constexpr (!kWide) {
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + place);
  } else {
    const float4* wide = reinterpret_cast<const float4*>(static_cast<const float*>(from) + place);
    const float4 low = wide[0], high = wide[1];
    return {packed_pair(low.x, low.y, T{}), packed_pair(low.z, low.w, T{}), packed_pair(high.x, high.y, T{}),
            packed_pair(high.z, high.w, T{})};
  }
}

// As in qlora_gemv.cuh a lane takes 16 values of k in a row, of both factors alike. in_features is a multiple of 64, x
// and A are at multiples of 16 bytes.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kDownThreads)
    lora_down_kernel(const T* x, const void* A, T* t, int64_t in_features, int rows, int rank) {
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane >> 2, column = lane & 3;
  const int token = blockIdx.x * kDownTokens, first_rank = blockIdx.y * kDownRanks;
  const T* const x0 = x + min(token + row, rows - 1) * in_features;
  const T* const x1 = x + min(token + row + 8, rows - 1) * in_features;
  const int64_t of_A = min(first_rank + row, rank - 1) * in_features;
  float sums[4] = {};
#pragma unroll 2
  for (int64_t k = 64 * warp + 16 * column; k < in_features; k += 64 * kDownWarps) {
    const uint4 x00 = *reinterpret_cast<const uint4*>(x0 + k), x01 = *reinterpret_cast<const uint4*>(x0 + k + 8);
    const uint4 x10 = *reinterpret_cast<const uint4*>(x1 + k), x11 = *reinterpret_cast<const uint4*>(x1 + k + 8);
    const uint4 low = eight<T, kWide>(A, of_A + k), high = eight<T, kWide>(A, of_A + k + 8);
    multiply_add<T>(sums, {x00.x, x10.x, x00.y, x10.y}, {low.x, low.y});
    multiply_add<T>(sums, {x00.z, x10.z, x00.w, x10.w}, {low.z, low.w});
    multiply_add<T>(sums, {x01.x, x11.x, x01.y, x11.y}, {high.x, high.y});
    multiply_add<T>(sums, {x01.z, x11.z, x01.w, x11.w}, {high.z, high.w});
  }
  __shared__ float parts[kDownWarps][kDownTokens * kDownRanks];
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][(row + 8 * (i >> 1)) * kDownRanks + 2 * column + (i & 1)] = sums[i];
  __syncthreads();
  if (threadIdx.x >= kDownTokens * kDownRanks) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kDownWarps; ++i) sum += parts[i][threadIdx.x];
  const int of_token = token + threadIdx.x / kDownRanks, of_rank = first_rank + threadIdx.x % kDownRanks;
  if (of_token < rows && of_rank < rank) t[static_cast<int64_t>(of_token) * rank + of_rank] = rounded<T>(sum);
}

template <typename T>
void lora_down(const char* name, const T* x, const void* A, bool wide, T* t, int64_t in_features, int rows, int rank,
               cudaStream_t stream) {
  const dim3 grid((rows + kDownTokens - 1) / kDownTokens, (rank + kDownRanks - 1) / kDownRanks);
  launch_kernel(name, wide ? lora_down_kernel<T, true> : lora_down_kernel<T, false>, {grid, kDownThreads, stream}, x, A,
                t, in_features, rows, rank);
}

}  // namespace harlora::cuda
