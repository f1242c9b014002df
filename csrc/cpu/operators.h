#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The operators of harlora_cpp on the CPU; their schemas are in bindings.cpp, what they mean in kernels/reference.py.
// All of them check what memory safety needs; the messages for users are in kernels/ops.py.

namespace harlora::cpu {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor bounds, int64_t blocksize, bool fp4);

void dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, Tensor out, Optional nested_absmax,
                     Optional nested_offset, Optional nested_code, int64_t stream);

// y, and t written into `t` where it is given. `precision`, a value of Precision: what float32 x and weight are rounded
// to before the base product, if the kernels have such products for the layer; for inference.
Tensor qlora_linear(Tensor x, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, int64_t out_features,
                    Optional bias, Optional lora_A, Optional lora_B, double scaling, Optional t,
                    Optional nested_absmax, Optional nested_offset, Optional nested_code, int64_t precision);

// Gradients into those of grad_x, grad_bias, grad_A and grad_B that are given.
void qlora_linear_backward(Tensor grad, Optional x, Optional t, Tensor packed, Tensor absmax, Tensor code,
                           int64_t blocksize, int64_t in_features, Optional lora_A, Optional lora_B, double scaling,
                           Optional grad_x, Optional grad_bias, Optional grad_A, Optional grad_B,
                           Optional nested_absmax, Optional nested_offset, Optional nested_code);

// x (rows, columns) into `out`, which may be x, with zeros where values are dropped; kernels/dropout.py says which.
void dropout(Tensor x, Tensor seed, int64_t limit, Tensor out);

// Three layers over one x (..., in), float32: q, k, v, and what backward needs of them. Layers are described as in class
// Layers of operators.cpp; facts begin with in_features, and each layer's with its out_features.
std::tuple<Tensor, Tensor, Tensor, Tensor> qlora_qkv(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                                     std::vector<double> factors, int64_t precision);

// Gradients of x, then of bias, lora_A and lora_B of each layer; empty where not `wanted`: whether that of x is, then
// for each layer the sum of 1 (bias), 2 (lora_A) and 4 (lora_B).
std::vector<Tensor> qlora_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor x, Tensor t,
                                       std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                       std::vector<double> factors, std::vector<int64_t> wanted);

// fc2(gelu(fc1(x))), float32, described alike; and, empty unless `keep`, what backward needs: fc1(x) and both t.
std::tuple<Tensor, Tensor, Tensor> qlora_mlp(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                             std::vector<double> factors, bool keep, int64_t precision);
std::vector<Tensor> qlora_mlp_backward(Tensor grad, Tensor x, Tensor inner, Tensor t, std::vector<Tensor> tensors,
                                       std::vector<int64_t> facts, std::vector<double> factors,
                                       std::vector<int64_t> wanted);

// softmax(q·kᵀ / sqrt(size of a head))·v; all are (windows, tokens, width) in float32, the values of a head side by
// side. Backward computes the softmax anew.
Tensor attention(Tensor q, Tensor k, Tensor v, int64_t heads);
std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int64_t heads);

// The whole MAE encoder, inference in float32: x (windows, tokens, features) are the patches. Its layers, described as
// in class Layers, are held under a number from encoder_hold to encoder_release: handing over hundreds of tensors in each
// call would take longer than a window does. What they point to is read anew in each call.
int64_t encoder_hold(std::vector<Tensor> tensors, std::vector<int64_t> facts, std::vector<double> factors);
void encoder_release(int64_t held);
Tensor encoder(Tensor x, int64_t held, int64_t precision);

// The name of the kernels that serve.
std::string kernels_name();

// What inference may be rounded to with the kernels that serve: names of values of Precision, apart by spaces.
std::string precisions();

// The kernels named, or the best if `name` is empty, serve from now on; returns their name.
std::string select_kernels(std::string name);

}  // namespace harlora::cpu
