// The kernels of csrc/cuda/ that the model of device.h can run, as the CPU's kernels of their operators, and recordings
// of their calls: csrc/gpu/, here its own operators, whose driver is this library.

#include <torch/csrc/stable/library.h>

#include "cuda/encoder.cu"
#include "cuda/lora_grads.cu"
#include "cuda/qlora_dx.cu"
#include "cuda/qlora_gemm.cu"
#include "cuda/qlora_gemv.cu"
#define HARLORA_CUDA
#include "gpu/launches.cpp"

extern "C" __attribute__((visibility("default"))) int cuCtxGetDevice(int* device) {
  *device = -1;  // of tensors on a CPU
  return 0;
}
extern "C" __attribute__((visibility("default"))) int cuLaunchKernel() { return 1; }

// What load_once and copy_once have read since it was last asked.
extern "C" __attribute__((visibility("default"))) int64_t bytes_read_once() {
  return std::exchange(harlora::cuda::bytes_read_once, 0);
}

// The pairs that each word's bytes stand for, by permutes.
extern "C" __attribute__((visibility("default"))) void pairs_by_planes(const uint16_t* values, const uint32_t* words,
                                                                       int64_t count, uint32_t* found) {
  const harlora::cuda::Planes planes(values);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t pairs[4];
    planes.pairs(words[i], pairs);
    std::memcpy(found + 4 * i, pairs, sizeof pairs);
  }
}

namespace harlora::cuda {

void qlora_gemm(Tensor, Tensor, Tensor, Tensor, int64_t, std::optional<Tensor>, std::optional<Tensor>,
                std::optional<Tensor>, double, Tensor, Tensor, int64_t, int64_t, std::optional<Tensor>,
                std::optional<Tensor>, std::optional<Tensor>, int64_t) {
  STD_TORCH_CHECK(false, "the model of a GPU has no wgmma");
}

void qlora_dx_sm90(const ManyRows&, int, cudaStream_t) {
  STD_TORCH_CHECK(false, "the model of a GPU has no wgmma");
}

}  // namespace harlora::cuda

STABLE_TORCH_LIBRARY_IMPL(harlora_cpp, CPU, library) {
  library.impl("qlora_gemv", TORCH_BOX(&harlora::cuda::qlora_gemv));
  library.impl("qlora_mma", TORCH_BOX(&harlora::cuda::qlora_mma));
  library.impl("qlora_dx", TORCH_BOX(&harlora::cuda::qlora_dx));
  library.impl("lora_grads", TORCH_BOX(&harlora::cuda::lora_grads));
  library.impl("encoder_blocks", TORCH_BOX(&harlora::cuda::encoder_blocks));
}

STABLE_TORCH_LIBRARY(harlora_model, library) {
  library.def("encoder_shared_bytes(int width, int hidden, int rank, int token_tiles) -> int");
  library.def("encoder_room(int width, int hidden, int rank, bool nested, int token_tiles, int parts) -> int");
  library.def("launches_hold(int[] facts, str driver) -> int");
  library.def("launches_release(int held) -> ()");
  library.def("launches_run(Tensor[] inputs, int held, int stream) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(harlora_model, CompositeExplicitAutograd, library) {
  library.impl("encoder_shared_bytes", TORCH_BOX(&harlora::cuda::encoder_shared_bytes));
  library.impl("encoder_room", TORCH_BOX(&harlora::cuda::encoder_room));
  library.impl("launches_hold", TORCH_BOX(&harlora::gpu::launches_hold));
  library.impl("launches_release", TORCH_BOX(&harlora::gpu::launches_release));
  library.impl("launches_run", TORCH_BOX(&harlora::gpu::launches_run));
}
