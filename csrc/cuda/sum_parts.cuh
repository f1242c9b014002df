#pragma once

// Sums of which several blocks of threads have computed a part each. Included by .cu files alone.

#include <cstdint>

#include "launch.cuh"
#include "ptx.cuh"
#include "types.cuh"

namespace harlora::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumValues = 4;  // of y, for a thread

// y from parts one after the other, always in the same order, rounded once.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const float* workspace, T* y, int64_t numel, int parts) {
  wait_for_previous();
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kSumValues;
  if (numel % kSumValues == 0) {
    if (place >= numel) return;
    float4 total{};
    for (int part = 0; part < parts; ++part) {
      const float4 more = *reinterpret_cast<const float4*>(workspace + part * numel + place);
      total = {total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w};
    }
    *reinterpret_cast<uint2*>(y + place) = {packed_pair(total.x, total.y, T{}), packed_pair(total.z, total.w, T{})};
    return;
  }
  for (int64_t i = place; i < min(place + kSumValues, numel); ++i) {
    float total = 0;
    for (int part = 0; part < parts; ++part) total += workspace[part * numel + i];
    y[i] = rounded<T>(total);
  }
}

// workspace: (parts, numel), at a multiple of 16 bytes. Starts beside the kernel before, which it waits for.
template <typename T>
void sum_parts(const char* name, const float* workspace, T* y, int64_t numel, int parts, cudaStream_t stream) {
  constexpr int64_t values = kSumThreads * kSumValues;
  launch_kernel(name, sum_parts_kernel<T>,
                {.grid = dim3(static_cast<unsigned>((numel + values - 1) / values)),
                 .threads = kSumThreads,
                 .stream = stream,
                 .early = true},
                workspace, y, numel, parts);
}

}  // namespace harlora::cuda
