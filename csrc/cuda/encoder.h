#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace harlora::cuda {

// All blocks of a small pre-LayerNorm encoder and its last norm, inference, in one launch for up to eight blocks:
//
//   s = x + o(attention(q(n), k(n), v(n))),  n = norm1(x);  x' = s + fc2(gelu(fc1(norm2(s))));  y = norm(x')
//
//   x             (windows, tokens, width), bfloat16 or float16, contiguous at a multiple of 16 bytes; at most 64
//                 tokens; width a multiple of 64, at most 256
//   tensors       of each block norm1's weight and bias; of q, k, v and o packed, absmax, if nested nested_absmax and
//                 nested_offset, with `bias` the bias, with `adapter` lora_A and lora_B; norm2's; fc1's and fc2's; then
//                 the last norm's weight and bias. Adapters are in the dtype of x or all in float32
//   heads         width / heads is a multiple of 16, at most 64
//   hidden        out_features of fc1, a multiple of 64
//   blocksize     a power of two of at least 64
//   eps           of norm1 and norm2 of each block, and of the last norm
//   scaling       of q, k, v, o, fc1 and fc2 of each block
//   y             like x
//   token_tiles   a block of threads has this many times 8 rows of x, whole windows: 2, 4 or 8
//   parts         blocks of threads, a cluster, that share the rows of each weight: 1, 2, 4 or 8; 1 before sm_90
//   nested_code   (256), float32, if scales are nested
//   stream        the cudaStream_t, from Python
void encoder_blocks(torch::stable::Tensor x, std::vector<torch::stable::Tensor> tensors, int64_t heads, int64_t hidden,
                    int64_t blocksize, bool bias, bool adapter, std::vector<double> eps, std::vector<double> scaling,
                    torch::stable::Tensor code, torch::stable::Tensor y, int64_t token_tiles, int64_t parts,
                    std::optional<torch::stable::Tensor> nested_code, int64_t stream);

// How many blocks of threads, or clusters of `parts` of them, find room at once on the current device; 0 where the code
// that runs there has no clusters.
int64_t encoder_room(int64_t width, int64_t hidden, int64_t rank, bool nested, int64_t token_tiles, int64_t parts);

// Bytes of shared memory that a block of threads takes.
int64_t encoder_shared_bytes(int64_t width, int64_t hidden, int64_t rank, int64_t token_tiles);

}  // namespace harlora::cuda
