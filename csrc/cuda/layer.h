#pragma once

// What the ways of the layer are given, checked before a kernel sees it. Host code alone.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>

namespace harlora::cuda {

struct LayerFacts {
  int64_t rows, in_features, out_features, rank;
  int shift;    // log2(blocksize)
  bool nested;  // scales
  bool wide;    // float32 adapter
};

inline bool is_flat(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype, int64_t numel) {
  return tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == numel;
}
inline bool is_aligned(const torch::stable::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// log2(blocksize) of a weight in_features of which are a multiple of 64 and of blocksize. `name` begins the message of
// what is wrong.
inline int checked_weight(const char* name, int64_t in_features, int64_t out_features,
                          const torch::stable::Tensor& packed, const torch::stable::Tensor& absmax,
                          const torch::stable::Tensor& code, int64_t blocksize,
                          const std::optional<torch::stable::Tensor>& nested_absmax,
                          const std::optional<torch::stable::Tensor>& nested_offset,
                          const std::optional<torch::stable::Tensor>& nested_code) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(blocksize >= 64 && (blocksize & (blocksize - 1)) == 0 && in_features > 0 &&
                      in_features % blocksize == 0 && out_features > 0,
                  name, ": in_features must be a multiple of blocksize, a power of two of at least 64");
  int shift = 0;
  while ((int64_t{1} << shift) < blocksize) ++shift;
  const int64_t weights = in_features * out_features, blocks = weights / blocksize;
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(is_flat(packed, ScalarType::Byte, weights / 2) && is_aligned(packed), name,
                  ": packed must be contiguous at a multiple of 16 bytes, two codes in a byte");
  STD_TORCH_CHECK(is_flat(absmax, nested ? ScalarType::Byte : ScalarType::Float, blocks), name,
                  ": absmax must have one contiguous value for each block, float32 or, if nested, uint8");
  STD_TORCH_CHECK(is_flat(code, ScalarType::Float, 16), name, ": code must be 16 contiguous float32 values");
  const auto floats = [](const std::optional<torch::stable::Tensor>& tensor, int64_t numel) {
    return tensor && is_flat(*tensor, ScalarType::Float, numel);
  };
  STD_TORCH_CHECK(!nested || (floats(nested_absmax, (blocks + 255) / 256) && floats(nested_offset, 1) &&
                              floats(nested_code, 256)),
                  name, ": nested scales need nested_absmax, nested_offset and nested_code, float32");
  return shift;
}

// x, y and packed contiguous at multiples of 16 bytes, in_features a multiple of 64 and of blocksize; everything else
// as qlora_gemv.h, qlora_gemm.h and qlora_gemm_sm90.h say. `name` begins the message of what is wrong.
inline LayerFacts checked_layer(const char* name, const torch::stable::Tensor& x, const torch::stable::Tensor& packed,
                                const torch::stable::Tensor& absmax, const torch::stable::Tensor& code,
                                int64_t blocksize, const std::optional<torch::stable::Tensor>& bias,
                                const std::optional<torch::stable::Tensor>& A,
                                const std::optional<torch::stable::Tensor>& B, const torch::stable::Tensor& y,
                                const torch::stable::Tensor& t,
                                const std::optional<torch::stable::Tensor>& nested_absmax,
                                const std::optional<torch::stable::Tensor>& nested_offset,
                                const std::optional<torch::stable::Tensor>& nested_code) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": x must be bfloat16 or float16");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.size(0) == x.size(0) && x.size(0) > 0 && x.is_contiguous() &&
                      is_aligned(x) && is_flat(y, type, y.numel()) && is_aligned(y),
                  name, ": x and y must be matrices of as many rows and one dtype, contiguous at 16 bytes");
  LayerFacts facts{x.size(0), x.size(1), y.size(1), A ? A->size(0) : 0, 0, nested_absmax.has_value(),
                   A && A->scalar_type() == ScalarType::Float};
  facts.shift = checked_weight(name, facts.in_features, facts.out_features, packed, absmax, code, blocksize,
                               nested_absmax, nested_offset, nested_code);
  STD_TORCH_CHECK(!bias || is_flat(*bias, type, facts.out_features), name,
                  ": bias must have out_features contiguous values in the dtype of x");
  STD_TORCH_CHECK(A.has_value() == B.has_value(), name, ": lora_A and lora_B must be given together");
  const auto of_adapter = facts.wide ? ScalarType::Float : type;
  STD_TORCH_CHECK(is_flat(t, type, facts.rows * facts.rank) &&
                      (!A || (is_flat(*A, of_adapter, facts.rank * facts.in_features) && is_aligned(*A) &&
                              is_flat(*B, of_adapter, facts.out_features * facts.rank))),
                  name, ": lora_A, lora_B and t must be contiguous and fit x and y; t in the dtype of x, lora_A and "
                  "lora_B both in it or in float32");
  return facts;
}

template <typename T>
const T* pointer(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace harlora::cuda
