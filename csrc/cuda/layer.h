#pragma once

// What the ways of the layer are given, checked before a kernel sees it. Host code alone.

#include <torch/csrc/stable/tensor.h>
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
  const auto is = [](const Tensor& tensor, ScalarType dtype, int64_t numel) {
    return tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == numel;
  };
  const auto aligned = [](const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; };
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": x must be bfloat16 or float16");
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.size(0) == x.size(0) && x.size(0) > 0 && x.is_contiguous() &&
                      aligned(x) && is(y, type, y.numel()) && aligned(y),
                  name, ": x and y must be matrices of as many rows and one dtype, contiguous at 16 bytes");
  LayerFacts facts{x.size(0), x.size(1), y.size(1), A ? A->size(0) : 0, 0, nested_absmax.has_value(),
                   A && A->scalar_type() == ScalarType::Float};
  STD_TORCH_CHECK(blocksize >= 64 && (blocksize & (blocksize - 1)) == 0 && facts.in_features > 0 &&
                      facts.in_features % blocksize == 0 && facts.out_features > 0,
                  name, ": in_features must be a multiple of blocksize, a power of two of at least 64");
  while ((int64_t{1} << facts.shift) < blocksize) ++facts.shift;
  const int64_t weights = facts.in_features * facts.out_features, blocks = weights / blocksize;
  STD_TORCH_CHECK(is(packed, ScalarType::Byte, weights / 2) && aligned(packed), name,
                  ": packed must be contiguous at a multiple of 16 bytes, two codes in a byte");
  STD_TORCH_CHECK(is(absmax, facts.nested ? ScalarType::Byte : ScalarType::Float, blocks), name,
                  ": absmax must have one contiguous value for each block, float32 or, if nested, uint8");
  STD_TORCH_CHECK(is(code, ScalarType::Float, 16), name, ": code must be 16 contiguous float32 values");
  const auto floats = [&](const std::optional<Tensor>& tensor, int64_t numel) {
    return tensor && is(*tensor, ScalarType::Float, numel);
  };
  STD_TORCH_CHECK(!facts.nested || (floats(nested_absmax, (blocks + 255) / 256) && floats(nested_offset, 1) &&
                                    floats(nested_code, 256)),
                  name, ": nested scales need nested_absmax, nested_offset and nested_code, float32");
  STD_TORCH_CHECK(!bias || is(*bias, type, facts.out_features), name,
                  ": bias must have out_features contiguous values in the dtype of x");
  STD_TORCH_CHECK(A.has_value() == B.has_value(), name, ": lora_A and lora_B must be given together");
  const auto of_adapter = facts.wide ? ScalarType::Float : type;
  STD_TORCH_CHECK(is(t, type, facts.rows * facts.rank) &&
                      (!A || (is(*A, of_adapter, facts.rank * facts.in_features) && aligned(*A) &&
                              is(*B, of_adapter, facts.out_features * facts.rank))),
                  name, ": lora_A, lora_B and t must be contiguous and fit x and y; t in the dtype of x, lora_A and "
                  "lora_B both in it or in float32");
  return facts;
}

template <typename T>
const T* pointer(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace harlora::cuda
