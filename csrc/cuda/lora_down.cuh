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

// Eight values of an adapter as they are in memory; of float32, 32 bytes.
template <bool kWide>
struct Eight {
  uint4 words[kWide ? 2 : 1];
};

template <bool kWide>
__device__ __forceinline__ Eight<kWide> unrounded_eight(const void* from, int64_t place) {
  const uint8_t* const first = static_cast<const uint8_t*>(from) + place * (kWide ? 4 : 2);
  Eight<kWide> found;
#pragma unroll
  for (int i = 0; i < (kWide ? 2 : 1); ++i) found.words[i] = reinterpret_cast<const uint4*>(first)[i];
  return found;
}

// The same, two in a word; float32 is rounded.
template <typename T, bool kWide>
__device__ __forceinline__ uint4 rounded_eight(const Eight<kWide>& from) {
  if constexpr (!kWide) {
    return from.words[0];
  } else {
    const auto two = [](uint32_t low, uint32_t high) {
      return packed_pair(__uint_as_float(low), __uint_as_float(high), T{});
    };
    const uint4 low = from.words[0], high = from.words[1];
    return {two(low.x, low.y), two(low.z, low.w), two(high.x, high.y), two(high.z, high.w)};
  }
}

template <typename T, bool kWide>
__device__ __forceinline__ uint4 eight(const void* from, int64_t place) {
  return rounded_eight<T>(unrounded_eight<kWide>(from, place));
}

// As in qlora_gemv.cuh a lane takes 16 values of k in a row, of both factors alike. in_features is a multiple of 64, x
// and A are at multiples of 16 bytes.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kDownThreads)
    lora_down_kernel(const T* x, const void* A, T* t, int64_t in_features, int rows, int rank) {
  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane >> 2, column = lane & 3;
  // Blocks with the same rows of x run beside each other: all but the first find them in the second cache.
  const int groups = (rank + kDownRanks - 1) / kDownRanks;
  const int token = blockIdx.x / groups * kDownTokens, first_rank = blockIdx.x % groups * kDownRanks;
  const T* const x0 = x + min(token + row, rows - 1) * in_features;
  const T* const x1 = x + min(token + row + 8, rows - 1) * in_features;
  const int64_t of_A = min(first_rank + row, rank - 1) * in_features;
  // All that some steps need is asked for at once: a kernel of so few blocks takes what memory takes to answer, as many
  // times as it waits, and the compiler by itself has it wait twice in each step.
  struct Read {
    uint4 x[2][2];
    Eight<kWide> A[2];
  };
  constexpr int kAtOnce = kWide ? 2 : 4;
  const bool has_more = token + 8 < rows;
  float sums[4] = {};
  for (int64_t first = 64 * warp + 16 * column; first < in_features; first += 64 * kDownWarps * kAtOnce) {
    Read read[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t k = first + 64 * kDownWarps * i;
      if (k >= in_features) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        read[i].x[0][half] = *reinterpret_cast<const uint4*>(x0 + k + 8 * half);
        if (has_more) read[i].x[1][half] = *reinterpret_cast<const uint4*>(x1 + k + 8 * half);
        read[i].A[half] = unrounded_eight<kWide>(A, of_A + k + 8 * half);
      }
    }
    asm volatile("" ::: "memory");
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 one = read[i].x[0][half], other = read[i].x[1][half], of = rounded_eight<T>(read[i].A[half]);
        multiply_add<T>(sums, {one.x, other.x, one.y, other.y}, {of.x, of.y});
        multiply_add<T>(sums, {one.z, other.z, one.w, other.w}, {of.z, of.w});
      }
    }
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
  const unsigned groups = (rank + kDownRanks - 1) / kDownRanks;
  const dim3 grid((rows + kDownTokens - 1) / kDownTokens * groups);
  launch_kernel(name, wide ? lora_down_kernel<T, true> : lora_down_kernel<T, false>, {grid, kDownThreads, stream}, x, A,
                t, in_features, rows, rank);
}

}  // namespace harlora::cuda
