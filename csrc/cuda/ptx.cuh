#pragma once

// Instructions that CUDA C++ has no words for, each wrapped once. Included by .cu files alone, which tests/host/device/
// also compiles for CPUs, with a model of each.

#ifndef __CUDACC__
#include "ptx_model.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace harlora::cuda {

// mma.sync m16n8k16: sums (16 × 8, float32) += a (16 × 16) · b (16 × 8), 16-bit factors, all of a warp together. sm_80.
//
// With g = lane / 4 and i = lane % 4 a lane holds (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   a[0], a[2]  row g,     columns 2i, 2i + 1 and 2i + 8, 2i + 9
//   a[1], a[3]  row g + 8, the same columns
//   b[0], b[1]  column g,  rows 2i, 2i + 1 and 2i + 8, 2i + 9
//   sums[0..1]  row g,     columns 2i, 2i + 1;  sums[2..3]  row g + 8
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sums)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ld.global.nc.L1::no_allocate: 8 bytes that are read once and leave the first cache to what is read often.
__device__ __forceinline__ uint2 load_once(const void* from) {
  uint2 words;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}

// The dynamic shared memory of the block, which begins at a multiple of 16 bytes.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint4 dynamic_words[];
  return reinterpret_cast<uint8_t*>(dynamic_words);
}

// Likewise 1, 2, 4 and 8 bytes, of what changes.
__device__ __forceinline__ uint32_t load_shared_1(uint32_t address) {
  uint32_t byte;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address) : "memory");
  return byte;
}
__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(address) : "memory");
  return half;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address) : "memory");
  return words;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// The 32-bit address that instructions know shared memory by.
__device__ __forceinline__ uint32_t address_of_shared(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// ld.shared by its 32-bit address: of a generic one the compiler keeps and adds both halves.
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint4& words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// movmatrix: of an 8 × 8 matrix of 16 bits, of which lane 4·row + i has columns 2i and 2i + 1, the transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// ldmatrix: the second factor of mma.sync, (16, 8), from rows of 8 values; lanes 0 to 15 give the address of one each,
// a multiple of 16.
__device__ __forceinline__ void load_transposed(uint32_t (&b)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address)
               : "memory");
}

// cp.async: 16 bytes from global to shared memory without a register between, zeros if not `there`. L2::128B: the rest
// of the 128 bytes comes into the second cache, where the next step of the same row finds it. sm_80.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same of bytes that are read once.
__device__ __forceinline__ void copy_once(uint32_t to, const void* from, bool there) { copy_async(to, from, there); }

// prefetch.global.L2: what a later load will ask for.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending groups of this thread's copies are on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// fence.proxy.async: what this thread has written to shared memory is seen by wgmma after the next barrier. sm_90.
__device__ __forceinline__ void show_to_async_units() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// barrier.cluster: what the threads of all blocks of a cluster wrote before is seen by all after it. sm_90.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// mapa: the address of the same place in the shared memory of another block of the cluster. sm_90.
__device__ __forceinline__ uint32_t shared_of(uint32_t block, uint32_t address) {
  uint32_t there = address;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
#endif
  return there;
}

// ld.shared::cluster: 16 bytes from there. sm_90.
__device__ __forceinline__ float4 load_cluster(uint32_t address) {
  float4 four{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
               : "r"(address)
               : "memory");
#endif
  return four;
}

// mbarrier of 8 bytes in shared memory, for bytes that arrive from other blocks of the cluster: by turns it is told how
// many are expected, by one thread, and all wait until they are there. Known to the others after a cluster_barrier.
// sm_90.
__device__ __forceinline__ void arrivals_begin([[maybe_unused]] uint32_t arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(arrivals)
               : "memory");
#endif
}
__device__ __forceinline__ void arrivals_expect([[maybe_unused]] uint32_t arrivals, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrivals), "r"(bytes) : "memory");
#endif
}
// parity: of the turn, of which the first is 0.
__device__ __forceinline__ void arrivals_wait([[maybe_unused]] uint32_t arrivals, [[maybe_unused]] int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t there = 0;
  while (!there) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(there)
        : "r"(arrivals), "r"(parity)
        : "memory");
  }
#endif
}

// st.async: 16 bytes into the shared memory of another block of the cluster, whose `arrivals` count them. sm_90.
__device__ __forceinline__ void store_async([[maybe_unused]] uint32_t address, [[maybe_unused]] uint4 words,
                                            [[maybe_unused]] uint32_t arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(arrivals)
               : "memory");
#endif
}

// The number of this block of threads among those of its cluster. sm_90.
__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// bar.sync of a part of the block: until so many threads, whole warps, have come here.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// griddepcontrol.launch_dependents: the next kernel of the stream, if launched so, may start before this one ends.
// sm_90.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// griddepcontrol.wait: until the kernel before has ended and what it wrote can be read. sm_90; elsewhere it has ended.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace harlora::cuda

#endif
