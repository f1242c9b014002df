#pragma once

// Hopper's copies of tiles and the barriers in shared memory that tell of their end: sm_90. Included by .cu files alone.

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

#include "launch.cuh"

namespace harlora::cuda {

// mbarrier: a phase ends when `arrivals` have come and all bytes that were announced. `barrier` is the 32-bit address of
// 8 bytes of shared memory.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What was initialised is seen by the other blocks of the cluster after its next barrier, and by copies.
__device__ __forceinline__ void barrier_init_end() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// An arrival that announces bytes.
__device__ __forceinline__ void barrier_announce(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// An arrival at a barrier of this block: what this thread has written before is seen by those who wait.
__device__ __forceinline__ void barrier_arrive_here(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// An arrival at a barrier of any block of the cluster, whose address is from `shared_of`: what this thread has read may
// be overwritten. For other blocks to see what it wrote that would take a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended; the first phase has parity 0, and the one before it counts as ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// cp.async.bulk.tensor: the tile of the matrix at column and row, to the same place in the shared memory of each block
// of the cluster whose bit is set in `to_blocks`, and its bytes to their barriers. Zeros past the last row and column.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& matrix, int column, int row, uint32_t barrier,
                                          uint16_t to_blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&matrix)), "r"(barrier), "r"(column), "r"(row), "h"(to_blocks)
      : "memory");
}
// Likewise to this block alone, which need not be of a cluster.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap& matrix, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(reinterpret_cast<uint64_t>(&matrix)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// setmaxnreg: registers of each thread of this warpgroup from here on, fewer or more than those it was launched with.
// sm_90a.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Whether this device runs what is compiled for 9.0 alone, which is empty elsewhere. The thread has a context from here
// on, without which the driver encodes no tiles: where nothing was launched yet, naming a device alone gives it none.
inline void check_hopper(const char* name) {
#ifndef HARLORA_SM90A
  STD_TORCH_CHECK(false, name, ": this build has no code for GPUs of compute capability 9.0");
#endif
  int device = 0, major = 0;
  check_launch(name, cudaGetDevice(&device));
  check_launch(name, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_TORCH_CHECK(major == 9, name, ": such tiles are for GPUs of compute capability 9.0");
  check_launch(name, cudaSetDevice(device));
}

// What `copy_tile` is told of a contiguous matrix: tiles of tile_rows rows (at most 256) and as many columns as the
// swizzle has bytes, 32, 64 or 128. `bytes` are those of a value, 1 or 2.
inline CUtensorMap matrix_of_tiles(const char* name, const void* data, int bytes, int64_t rows, int64_t columns,
                                   int tile_rows, int swizzle) {
  static const auto encode = [name] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check_launch(name, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                        &result));
#else
    check_launch(name, cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(found && result == cudaDriverEntryPointSuccess, name,
                    ": the driver of this GPU has no cuTensorMapEncodeTiled; it must be of CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns * bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(swizzle / bytes), static_cast<cuuint32_t>(tile_rows)};
  const cuuint32_t each[2] = {1, 1};
  const CUtensorMapSwizzle order = swizzle == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                                   : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult status =
      encode(&map, bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
             const_cast<void*>(data), sizes, strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, order,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, name, ": cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
  return map;
}

}  // namespace harlora::cuda
