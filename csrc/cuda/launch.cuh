#pragma once

// Launches of kernels, checked. Included by .cu files alone.

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>

namespace harlora::cuda {

inline void check_launch(const char* name, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": launch failed: ", cudaGetErrorString(error));
}

// Whether the kernel that runs on this device waits for the one before: machine code made at start from older PTX has
// no such instruction, and must not start early.
template <typename Kernel>
bool waits_for_previous(const char* name, Kernel kernel) {
  static std::array<std::atomic<int>, 64> known{};  // by device, PTX version; 0 where it was not asked
  int device = 0;
  check_launch(name, cudaGetDevice(&device));
  std::atomic<int>& version = known.at(device);
  if (!version) {
    cudaFuncAttributes attributes{};
    check_launch(name, cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
    version = attributes.ptxVersion;
  }
  return version >= 90;
}

struct Launch {
  dim3 grid;
  unsigned threads;
  cudaStream_t stream;
  size_t dynamic_bytes = 0;
  bool cluster = false;  // of the blocks along z; sm_90
  bool early = false;    // beside the kernel before, for which it waits itself
};

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& given, Arguments&&... arguments) {
  if (given.dynamic_bytes) {  // past 48 KiB, with what the kernel has besides, only on request
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(given.dynamic_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = given.grid;
  config.blockDim = dim3(given.threads);
  config.dynamicSmemBytes = given.dynamic_bytes;
  config.stream = given.stream;
  cudaLaunchAttribute attributes[2]{};
  if (given.cluster) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = given.grid.z;
  }
  if (given.early && waits_for_previous(name, kernel)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace harlora::cuda
