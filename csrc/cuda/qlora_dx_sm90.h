#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace harlora::cuda {

// What qlora_dx.h says, checked, for a tile of 256 rows of dY on GPUs of compute capability 9.0 alone; u is there.
// out_features is a multiple of 8, parts at most 8.
struct ManyRows {
  const void* grad;  // of 16 bits, bfloat16 or float16
  const uint8_t* packed;
  const void* absmax;
  const float* code;
  const void* A;
  const void* u;
  const float* nested_absmax;
  const float* nested_offset;
  const float* nested_code;
  void* grad_x;
  int64_t in_features;
  int64_t out_features;
  int rows;
  int rank;
  int shift;  // log2(blocksize)
  bool wide;
  bool bfloat16;
};

void qlora_dx_sm90(const ManyRows& given, int parts, cudaStream_t stream);

}  // namespace harlora::cuda
