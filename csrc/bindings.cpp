// Registration of the compiled backends, one block per device; no arithmetic.
//
// Written against libtorch's stable ABI: no Python symbol and no C++ ABI of libtorch is used, so one build serves
// every Python and every torch >= 2.10. The public operators harlora::* are defined in kernels/ops.py, which chooses
// between these functions and the reference; their namespace is apart so that both stay callable.

#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"
#include "cuda/dequantize_4bit.h"
#include "cuda/encoder.h"
#include "cuda/lora_grads.h"
#include "cuda/qlora_dx.h"
#include "cuda/qlora_gemm.h"
#include "cuda/qlora_gemm_sm90.h"
#include "cuda/qlora_gemv.h"
#include "gpu/launches.h"

// A quantised weight: the tensors of QuantizedWeight and the code tables of its format. What is mostly absent comes
// last with a default: an argument that is not passed costs a fifth of one that is.
#define HARLORA_WEIGHT "Tensor packed, Tensor absmax, Tensor code, int blocksize"
#define HARLORA_NESTED "Tensor? nested_absmax=None, Tensor? nested_offset=None, Tensor? nested_code=None"
#define HARLORA_LAYERS "Tensor[] tensors, int[] facts, float[] factors"

STABLE_TORCH_LIBRARY(harlora_cpp, library) {
  library.def("quantize_4bit(Tensor weight, Tensor bounds, int blocksize, bool fp4) -> (Tensor, Tensor)");
  library.def("dequantize_4bit(" HARLORA_WEIGHT ", Tensor(a!) out, " HARLORA_NESTED ", int stream=0) -> ()");
  library.def("qlora_linear(Tensor x, " HARLORA_WEIGHT
              ", int out_features, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor(a!)? t=None, "
              HARLORA_NESTED ", int precision=0) -> Tensor");
  library.def("qlora_gemv(Tensor x, " HARLORA_WEIGHT ", Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling,"
              " Tensor(a!) y, Tensor(b!) t, " HARLORA_NESTED ", int stream=0) -> ()");
  library.def("qlora_gemm(Tensor x, " HARLORA_WEIGHT ", Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling,"
              " Tensor(a!) y, Tensor(b!) t, int tile, int parts, " HARLORA_NESTED ", int stream=0) -> ()");
  library.def("qlora_mma(Tensor x, " HARLORA_WEIGHT ", Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling,"
              " Tensor(a!) y, Tensor(b!) t, int tile, int parts, Tensor(c!)? workspace, " HARLORA_NESTED
              ", int stream=0) -> ()");
  library.def("qlora_linear_backward(Tensor grad, Tensor? x, Tensor? t, " HARLORA_WEIGHT
              ", int in_features, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor(a!)? grad_x,"
              " Tensor(b!)? grad_bias, Tensor(c!)? grad_A, Tensor(d!)? grad_B, " HARLORA_NESTED ") -> ()");
  library.def("qlora_dx(Tensor grad, " HARLORA_WEIGHT ", Tensor? lora_A, Tensor? lora_B, float scaling,"
              " Tensor(a!)? grad_x, Tensor(b!)? u, Tensor(c!)? sums, int tile, int parts, " HARLORA_NESTED
              ", int stream=0) -> ()");
  library.def("lora_grads(Tensor grad, Tensor? x, Tensor? t, Tensor? u, float scaling, Tensor(a!)? grad_bias,"
              " Tensor(b!)? grad_A, Tensor(c!)? grad_B, int stream=0) -> ()");
  library.def("dropout(Tensor x, Tensor seed, int limit, Tensor(a!) out) -> ()");
  library.def("qlora_qkv(Tensor x, " HARLORA_LAYERS ", int precision=0) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("qlora_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor x, Tensor t, " HARLORA_LAYERS
              ", int[] wanted) -> Tensor[]");
  library.def("qlora_mlp(Tensor x, " HARLORA_LAYERS ", bool keep, int precision=0) -> (Tensor, Tensor, Tensor)");
  library.def("qlora_mlp_backward(Tensor grad, Tensor x, Tensor inner, Tensor t, " HARLORA_LAYERS
              ", int[] wanted) -> Tensor[]");
  library.def("attention(Tensor q, Tensor k, Tensor v, int heads) -> Tensor");
  library.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int heads) -> (Tensor, Tensor, Tensor)");
  library.def("encoder_hold(" HARLORA_LAYERS ") -> int");
  library.def("encoder_release(int held) -> ()");
  library.def("encoder(Tensor x, int held, int precision=0) -> Tensor");
  library.def("encoder_blocks(Tensor x, Tensor[] tensors, int heads, int hidden, int blocksize, bool bias,"
              " bool adapter, float[] eps, float[] scaling, Tensor code, Tensor(a!) y, int token_tiles, int parts,"
              " Tensor? nested_code=None, int stream=0) -> ()");
  library.def("encoder_shared_bytes(int width, int hidden, int rank, int token_tiles) -> int");
  library.def("encoder_room(int width, int hidden, int rank, bool nested, int token_tiles, int parts) -> int");
  library.def("launches_hold(int[] facts, str driver) -> int");
  library.def("launches_release(int held) -> ()");
  library.def("launches_run(Tensor[] inputs, int held, int stream) -> Tensor[]");
  library.def("kernels() -> str");
  library.def("precisions() -> str");
  library.def("select_kernels(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CPU, library) {
  library.impl("quantize_4bit", TORCH_BOX(&harlora::cpu::quantize_4bit));
  library.impl("dequantize_4bit", TORCH_BOX(&harlora::cpu::dequantize_4bit));
  library.impl("qlora_linear", TORCH_BOX(&harlora::cpu::qlora_linear));
  library.impl("dropout", TORCH_BOX(&harlora::cpu::dropout));
  library.impl("qlora_qkv", TORCH_BOX(&harlora::cpu::qlora_qkv));
  library.impl("qlora_qkv_backward", TORCH_BOX(&harlora::cpu::qlora_qkv_backward));
  library.impl("qlora_mlp", TORCH_BOX(&harlora::cpu::qlora_mlp));
  library.impl("qlora_mlp_backward", TORCH_BOX(&harlora::cpu::qlora_mlp_backward));
  library.impl("attention", TORCH_BOX(&harlora::cpu::attention));
  library.impl("attention_backward", TORCH_BOX(&harlora::cpu::attention_backward));
  library.impl("encoder", TORCH_BOX(&harlora::cpu::encoder));
  library.impl("qlora_linear_backward", TORCH_BOX(&harlora::cpu::qlora_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CompositeExplicitAutograd, library) {
  library.impl("kernels", TORCH_BOX(&harlora::cpu::kernels_name));
  library.impl("precisions", TORCH_BOX(&harlora::cpu::precisions));
  library.impl("encoder_hold", TORCH_BOX(&harlora::cpu::encoder_hold));
  library.impl("encoder_release", TORCH_BOX(&harlora::cpu::encoder_release));
  library.impl("launches_hold", TORCH_BOX(&harlora::gpu::launches_hold));
  library.impl("launches_release", TORCH_BOX(&harlora::gpu::launches_release));
  library.impl("launches_run", TORCH_BOX(&harlora::gpu::launches_run));
  library.impl("select_kernels", TORCH_BOX(&harlora::cpu::select_kernels));
}

#ifdef HARLORA_CUDA
STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CompositeExplicitAutograd, library) {
  library.impl("encoder_shared_bytes", TORCH_BOX(&harlora::cuda::encoder_shared_bytes));
  library.impl("encoder_room", TORCH_BOX(&harlora::cuda::encoder_room));
}

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CUDA, library) {
  library.impl("dequantize_4bit", TORCH_BOX(&harlora::cuda::dequantize_4bit));
  library.impl("qlora_gemv", TORCH_BOX(&harlora::cuda::qlora_gemv));
  library.impl("encoder_blocks", TORCH_BOX(&harlora::cuda::encoder_blocks));
  library.impl("qlora_mma", TORCH_BOX(&harlora::cuda::qlora_mma));
  library.impl("qlora_dx", TORCH_BOX(&harlora::cuda::qlora_dx));
  library.impl("lora_grads", TORCH_BOX(&harlora::cuda::lora_grads));
#ifdef HARLORA_SM90A  // for GPUs of 9.0 alone, whose machine code is here
  library.impl("qlora_gemm", TORCH_BOX(&harlora::cuda::qlora_gemm));
#endif
}
#endif
