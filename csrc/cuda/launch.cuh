#pragma once

// Launches of kernels, checked. Included by .cu files alone.

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
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

// Of this device.
inline int multiprocessors(const char* name) {
  static std::array<std::atomic<int>, 64> known{};  // by device; 0 where it was not asked
  int device = 0;
  check_launch(name, cudaGetDevice(&device));
  std::atomic<int>& count = known.at(device);
  if (!count) {
    int found = 0;
    check_launch(name, cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device));
    count = found;
  }
  return count;
}

struct Launch {
  dim3 grid;
  unsigned threads;
  cudaStream_t stream;
  size_t dynamic_bytes = 0;
  size_t most_dynamic_bytes = 0;  // of any launch of the kernel, recorded ones too, where they differ
  bool cluster = false;  // of the blocks along z; sm_90
  unsigned cluster_x = 1;  // and, then, of so many along x
  bool early = false;    // beside the kernel before, for which it waits itself
};

template <typename Kernel>
void ask_for_shared(const char* name, Kernel kernel, const Launch& given) {
  if (given.dynamic_bytes) {  // past 48 KiB, with what the kernel has besides, only on request
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(std::max(given.dynamic_bytes, given.most_dynamic_bytes))));
  }
}

inline cudaLaunchAttribute cluster_of(const Launch& given) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = given.cluster_x;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = given.grid.z;
  return cluster;
}

// How many blocks of threads, or clusters, find room at once on the current device.
template <typename Kernel>
int64_t most_at_once(const char* name, Kernel kernel, const Launch& given) {
  ask_for_shared(name, kernel, given);
  int found = 0;
  if (given.cluster) {
    cudaLaunchAttribute cluster = cluster_of(given);
    cudaLaunchConfig_t config{};
    config.gridDim = given.grid;
    config.blockDim = dim3(given.threads);
    config.dynamicSmemBytes = given.dynamic_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    check_launch(name, cudaOccupancyMaxActiveClusters(&found, kernel, &config));
    return found;
  }
  check_launch(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, static_cast<int>(given.threads),
                                                                   given.dynamic_bytes));
  return static_cast<int64_t>(found) * multiprocessors(name);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& given, Arguments&&... arguments) {
  ask_for_shared(name, kernel, given);
  cudaLaunchConfig_t config{};
  config.gridDim = given.grid;
  config.blockDim = dim3(given.threads);
  config.dynamicSmemBytes = given.dynamic_bytes;
  config.stream = given.stream;
  cudaLaunchAttribute attributes[2]{};
  if (given.cluster) attributes[config.numAttrs++] = cluster_of(given);
  if (given.early && waits_for_previous(name, kernel)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  check_launch(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace harlora::cuda
