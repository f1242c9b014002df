#pragma once

// A model of a GPU on which whole kernels of csrc/cuda/ run on a CPU, launch and all, for machines without a card.
// Each thread of a block, or of a cluster of blocks, is a fiber; where threads of a warp, block or cluster must meet
// they do, in an order that differs from meeting to meeting, and instructions of a whole warp are computed from what
// all its lanes gave, as NVIDIA's PTX ISA describes them, written here from that text alone. Copies that are
// asynchronous take place as early or as late as they may, and dynamic shared memory begins as NaN.
//
// It shows wrong places, sizes, layouts, orders and missing barriers. It knows nothing of time, registers, caches, of
// what a compiler for GPUs makes of the code, or of wgmma.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../values.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // of the one block that runs; kernels of clusters have dynamic shared memory alone

// Types ---------------------------------------------------------------------------------------------------------------

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return value_of(bits, true); }
};
struct __half {
  uint16_t bits;
  operator float() const { return value_of(bits, false); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &half, 2);
  return result;
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(a.x * b.x), __float2bfloat16_rn(a.y * b.y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) { return {__float2half_rn(a.x * b.x), __float2half_rn(a.y * b.y)}; }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__float2bfloat16_rn(std::fma(a.x, b.x, c.x)), __float2bfloat16_rn(std::fma(a.y, b.y, c.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__float2half_rn(std::fma(a.x, b.x, c.x)), __float2half_rn(std::fma(a.y, b.y, c.y))};
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xFF) * (b >> i & 0xFF);
  return sum;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return std::min<int64_t>(a, b); }
inline int64_t min(int a, int64_t b) { return std::min<int64_t>(a, b); }

// Threads -------------------------------------------------------------------------------------------------------------

inline dim3 gridDim, blockDim;

namespace device_model {

constexpr int kMostOfCluster = 8;
constexpr size_t kShared = 227 * 1024, kStack = 128 * 1024;
alignas(1024) inline uint8_t shared[kMostOfCluster][kShared];

// Where threads wait for each other.
struct Meeting {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;
};

struct Copy {
  uint8_t* to;
  const void* from;
  size_t bytes, zeros;
};

inline void carry_out(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

struct Warp {
  Meeting meeting;
  uint32_t given[32][16], taken[32][16];
};

struct Block {
  dim3 index;
  unsigned rank = 0;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  dim3 index;
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  const Meeting* waits_for = nullptr;
  unsigned generation = 0;
  bool ended = false;
  std::vector<Copy> copies;              // not yet a group
  std::deque<std::vector<Copy>> groups;  // on their way
};

inline Thread* self = nullptr;
inline ucontext_t scheduler;
inline unsigned cluster_size = 1;
inline Meeting of_cluster;
inline std::string failure;
inline std::function<void()> body;

[[noreturn]] inline void fail(const std::string& why) {
  failure = why;
  swapcontext(&self->context, &scheduler);
  std::abort();
}

// Until all have come; the last of them does `together` for all.
template <typename Together>
void meet(Meeting& meeting, const char* what, Together together) {
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) {
    fail(std::string("threads that must meet are at ") + meeting.what + " and at " + what);
  }
  if (++meeting.arrived == meeting.expected) {
    together();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  self->waits_for = &meeting;
  self->generation = meeting.generation;
  swapcontext(&self->context, &scheduler);
}

inline void run_thread() {
  body();
  self->ended = true;
  swapcontext(&self->context, &scheduler);
}

inline void prepare(Thread& thread, Block& block, int number) {
  if (!thread.stack) thread.stack.reset(new uint8_t[kStack]);
  thread.index = dim3(number);
  thread.lane = number % 32;
  thread.warp = &block.warps[number / 32];
  thread.block = &block;
  thread.waits_for = nullptr;
  thread.ended = false;
  thread.copies.clear();
  thread.groups.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  makecontext(&thread.context, run_thread, 0);
}

// The blocks of a cluster, to their end.
inline void run_cluster(std::vector<Block>& blocks, std::vector<Thread>& threads, std::mt19937& random) {
  const int of_block = static_cast<int>(blockDim.x);
  std::memset(shared, 0xFF, sizeof shared[0] * blocks.size());
  of_cluster = {of_block * static_cast<int>(blocks.size())};
  std::vector<Thread*> order;
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    block.meeting = {of_block};
    block.warps.assign((of_block + 31) / 32, {});
    for (Warp& warp : block.warps) warp.meeting = {32};
    for (int i = 0; i < of_block; ++i) {
      Thread& thread = threads[b * of_block + i];
      prepare(thread, block, i);
      order.push_back(&thread);
    }
  }
  for (size_t left = order.size(); left;) {
    bool moved = false;
    std::rotate(order.begin(), order.begin() + random() % order.size(), order.end());
    if (random() % 2) std::reverse(order.begin(), order.end());
    for (Thread* thread : order) {
      if (thread->ended || (thread->waits_for && thread->waits_for->generation == thread->generation)) continue;
      moved = true;
      thread->waits_for = nullptr;
      self = thread;
      swapcontext(&scheduler, &thread->context);
      if (!failure.empty()) throw std::runtime_error(failure);
      left -= thread->ended;
    }
    if (!moved) throw std::runtime_error("threads wait for others that have ended or never come");
  }
}

inline std::mutex one_at_a_time;

}  // namespace device_model

#define threadIdx (device_model::self->index)
#define blockIdx (device_model::self->block->index)

inline void __syncthreads() {
  device_model::meet(device_model::self->block->meeting, "__syncthreads", [] {});
}
inline void __syncwarp() {
  device_model::meet(device_model::self->warp->meeting, "__syncwarp", [] {});
}

template <typename Value>
Value exchanged(Value value, int from, const char* what) {
  static_assert(sizeof(Value) == 4);
  device_model::Warp& warp = *device_model::self->warp;
  std::memcpy(warp.given[device_model::self->lane], &value, 4);
  device_model::meet(warp.meeting, what, [&] { std::memcpy(warp.taken, warp.given, sizeof warp.given); });
  std::memcpy(&value, warp.taken[from], 4);
  return value;
}
template <typename Value>
Value __shfl_sync(uint32_t, Value value, int from, int width = 32) {
  return exchanged(value, (device_model::self->lane & ~(width - 1)) + from, "__shfl_sync");
}
template <typename Value>
Value __shfl_xor_sync(uint32_t, Value value, int with) {
  return exchanged(value, device_model::self->lane ^ with, "__shfl_xor_sync");
}

// Launches ------------------------------------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return device_model::failure.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
enum { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;  // so that few blocks of threads share out what there is
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace device_model {
inline std::map<const void*, size_t> asked_for;  // of dynamic shared memory, by each kernel
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int, size_t bytes) {
  device_model::asked_for[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = 8 / static_cast<int>(config->attrs[0].val.clusterDim.z);  // of a GPU with more multiprocessors
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace device_model;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  failure.clear();
  const std::tuple<Parameters...> given(arguments...);
  body = [&] { std::apply(kernel, given); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim;
  }
  cluster_size = cluster.x * cluster.y * cluster.z;
  if (config->dynamicSmemBytes > kShared || cluster_size > kMostOfCluster || gridDim.x % cluster.x ||
      gridDim.y % cluster.y || gridDim.z % cluster.z || blockDim.x > 1024 || !gridDim.x) {
    failure = "the sizes of the launch are wrong";
    return 1;
  }
  if (config->dynamicSmemBytes > asked_for[reinterpret_cast<const void*>(kernel)]) {
    failure = "more dynamic shared memory than was asked for";
    return 1;
  }
  static std::vector<Thread> threads;
  if (threads.size() < cluster_size * blockDim.x) threads = std::vector<Thread>(cluster_size * blockDim.x);
  static std::mt19937 random;
  std::vector<Block> blocks(cluster_size);
  for (unsigned z = 0; z < gridDim.z; z += cluster.z) {
    for (unsigned y = 0; y < gridDim.y; y += cluster.y) {
      for (unsigned x = 0; x < gridDim.x; x += cluster.x) {
        for (unsigned rank = 0; rank < cluster_size; ++rank) {
          blocks[rank].rank = rank;
          blocks[rank].index = dim3(x + rank % cluster.x, y + rank / cluster.x % cluster.y,
                                    z + rank / (cluster.x * cluster.y));
        }
        try {
          run_cluster(blocks, threads, random);
        } catch (const std::runtime_error& error) {
          failure = error.what();
          return 1;
        }
      }
    }
  }
  return cudaSuccess;
}

#include "ptx_model.h"
