#pragma once

// A tile of a product by wgmma whose first factor, the weight, is decoded in registers: what y (qlora_gemm_sm90.cu) and
// dX (qlora_dx_sm90.cu) have in common. Included by .cu files alone.
//
// yᵀ = Ŵ·xᵀ, kRows rows of it for a tile of rows of x ("tokens"), in steps of 64 values of k. One thread copies the
// tiles of x and of the codes into stages, two warpgroups of 64 rows each decode and multiply. Blocks of a cluster
// next to each other along the rows share the tiles of x: each copies a part of them to all, since the second cache
// could not feed every multiprocessor with whole ones. Blocks of a cluster along z share the sum over k.

#include <cstdint>

#include "launch.cuh"
#include "ptx.cuh"
#include "qlora_gemm_sm90.cuh"
#include "ragged.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace harlora::cuda::gemm90 {

template <int kTile>
constexpr int kStages = kTile == 256 ? 5 : 6;
template <int kTile>
constexpr int kTileBytes = 128 * kTile;
template <int kTile>
constexpr int kDynamicBytes = kStages<kTile> * (kTileBytes<kTile> + kWeightBytes) + 1024;  // to begin at a 1024
// Registers are handed out by warpgroup: with one that only copies the others can have almost all.
constexpr int kAllThreads = kThreads + 128, kFewRegisters = 56, kManyRegisters = 224;

// How a product of so many rows of the result is launched.
struct Cluster {
  // Blocks that share a tile of x. Not beside parts of a sum: larger clusters than two do not all find room at once.
  int shared;
  unsigned tiles;  // of rows; the last block of a cluster may have none
  Cluster(int64_t rows, int parts) {
    const auto needed = static_cast<unsigned>((rows + kRows - 1) / kRows);
    shared = needed > 1 && parts == 1 ? 2 : 1;
    tiles = (needed + shared - 1) / shared * shared;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The stages of a block of threads. Each has two barriers: `full`, its tiles are there; `empty`, all warps that read
// them have, also those of other blocks that read this part of x.
template <int kTile>
struct Stages {
  static constexpr int kCount = kStages<kTile>;
  uint32_t x, codes;  // their 32-bit addresses in shared memory
  uint32_t barriers;
  uint8_t* memory;   // of the first
  int shared;        // blocks that share x
  int in_group;      // this one's number among them
  uint32_t group;    // the first one's in the cluster
  bool alone;

  // By all threads. filling: arrivals that tell of a full stage, one of which is that of `copy`.
  __device__ __forceinline__ Stages(uint8_t* dynamic, uint64_t* of_barriers, int blocks, int filling) {
    const uint32_t begin = address_of_shared(dynamic);
    x = (begin + 1023) & ~1023u;
    codes = x + kCount * kTileBytes<kTile>;
    memory = dynamic + (x - begin);
    barriers = address_of_shared(of_barriers);
    shared = blocks;
    in_group = static_cast<int>(blockIdx.x) % blocks;
    group = rank_in_cluster() - in_group;
    alone = blocks * gridDim.z == 1;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kCount; ++i) {
        barrier_init(full(i), filling);
        barrier_init(empty(i), blocks * (kThreads / 32));
      }
      barrier_init_end();
    }
    __syncthreads();
    if (!alone) cluster_barrier();  // nobody copies to a block whose barriers are not there
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 8 * (kCount + stage); }

  // One thread: the tiles of each step, of x (rows, k) from first_token on; copy_codes(step, to, barrier) has those of
  // the weight.
  template <typename CopyCodes>
  __device__ __forceinline__ void copy(const CUtensorMap& of_x, int begin, int count, int first_token,
                                       const CopyCodes& copy_codes) const {
    const int part = kTile / shared;
    const auto to_all = static_cast<uint16_t>(((1u << shared) - 1) << group);
    int stage = 0;
    uint32_t parity = 1;
    for (int step = begin; step < begin + count; ++step) {
      barrier_wait(empty(stage), parity);
      barrier_announce(full(stage), kTileBytes<kTile> + kWeightBytes);
      copy_codes(step, codes + stage * kWeightBytes, full(stage));
      const uint32_t to = x + stage * kTileBytes<kTile> + 128 * part * in_group;
      if (shared == 1) {
        copy_tile(to, of_x, step * kStep, first_token, full(stage));
      } else {
        copy_tile(to, of_x, step * kStep, first_token + part * in_group, full(stage), to_all);
      }
      advance(stage, parity);
    }
  }
  static __device__ __forceinline__ void advance(int& stage, uint32_t& parity) {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }

  // By the threads of both warpgroups. decode(product, operand) for each 16 values of k of a step; before them
  // prepare(step, stage), when its tiles are there and before the last product of the step before, so that what it asks
  // for has come when that has begun, and begin(step). Products follow each other without a pause: the operand of the next is decoded
  // while they are computed, each into registers that the product before the last three has read.
  template <typename T, typename Prepare, typename Begin, typename Decode>
  __device__ __forceinline__ void multiply(float (&sums)[kTile / 2], int count, const Prepare& prepare,
                                           const Begin& begin, const Decode& decode) const {
    constexpr int last = kProducts - 1;
    const uint64_t operand = wgmma_operand(x);
    uint32_t weights[kProducts][1][4];
    int stage = 0, before = 0;
    uint32_t parity = 0;
    const auto issue = [&](int product, int of) {
      wgmma_operand_is_there(weights[product]);
      wgmma_begin();
      Wgmma<T, kTile>::run(sums, weights[product][0], operand + ((of * kTileBytes<kTile>) >> 4) + 2 * product);
      wgmma_commit();
      wgmma_wait<last>();
    };
    const auto all_but_last = [&] {
#pragma unroll
      for (int product = 0; product < last; ++product) {
        decode(product, weights[product][0]);
        issue(product, stage);
      }
    };
    barrier_wait(full(0), 0);
    prepare(0, 0);
    begin(0);
    all_but_last();
    // A turn begins with the last product of the step before: the compiler lets products follow each other if no branch
    // is between them.
    for (int step = 1; step < count; ++step) {
      before = stage;
      advance(stage, parity);
      barrier_wait(full(stage), parity);
      prepare(step, stage);
      decode(last, weights[last][0]);
      issue(last, before);
      begin(step);
      all_but_last();
      if (threadIdx.x % 32 < shared) {  // the products of the step before have ended
        barrier_arrive(shared_of(group + threadIdx.x % 32, empty(before)));
      }
    }
    decode(last, weights[last][0]);
    issue(last, stage);
    wgmma_wait<0>();
    sync();  // the stages are free
  }
  // Of both warpgroups.
  static __device__ __forceinline__ void sync() { sync_some<1, kThreads>(); }

  // The adapter: `low` (rows, rank), pitch values from row to row, takes the place of x, and weight_at(which, column)
  // that of the weight, for the first or the second row of the thread's two.
  template <typename T, typename WeightAt>
  __device__ __forceinline__ void add_adapter(float (&sums)[kTile / 2], const T* low, int pitch, int rank,
                                              int first_token, int rows, const WeightAt& weight_at) const {
    const int thread = threadIdx.x;
    const uint64_t operand = wgmma_operand(x);
    for (int first = 0; first < rank; first += kStep) {
      const int columns = min(kStep, rank - first), products = (columns + 15) / 16;
      for (int i = thread; i < kTile * 2 * products; i += kThreads) {
        const int of = i / (2 * products), chunk = i % (2 * products);
        const int there = first_token + of < rows ? columns - 8 * chunk : 0;
        const T* const from = low + static_cast<int64_t>(first_token + of) * pitch + first + 8 * chunk;
        *reinterpret_cast<uint4*>(memory + place_of_x(of, chunk)) =
            pitch % 8 == 0 && rank % 8 == 0 ? eight_or_zeros<true>(from, there) : eight_or_zeros<false>(from, there);
      }
      show_to_async_units();
      sync();
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
        if (product >= products) break;
        uint32_t weights[1][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 16 * product + 8 * (i >> 1) + 2 * (thread & 3);
          const auto at = [&](int of) { return of < columns ? weight_at(i & 1, first + of) : 0.0f; };
          weights[0][i] = packed_pair(at(column), at(column + 1), T{});
        }
        wgmma_operand_is_there(weights);
        wgmma_begin();
        Wgmma<T, kTile>::run(sums, weights[0], operand + 2 * product);
        wgmma_commit();
        wgmma_wait<0>();
      }
      sync();
    }
  }

  // The sums and bias, of all blocks that share them, to y (rows, width), `columns` of which are this thread's two in
  // the tile from first_column on. By way of shared memory, so that 16 bytes of a row of y are written at once.
  template <typename T>
  __device__ __forceinline__ void write(const float (&sums)[kTile / 2], const float (&bias)[2], const int (&columns)[2],
                                        T* y, int rows, int64_t width, int first_token, int64_t first_column) const {
    const int thread = threadIdx.x;
    if (gridDim.z == 1) {
      constexpr int pitch = kRows + 8;
      T* const tile = reinterpret_cast<T*>(memory);
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        const int which = i >> 1 & 1;
        tile[token_of_sum(thread, i) * pitch + columns[which]] = rounded<T>(sums[i] + bias[which]);
      }
      sync();
      for (int i = thread; i < kTile * (kRows / 8); i += kThreads) {
        const int of = i / (kRows / 8), column = i % (kRows / 8) * 8;
        if (first_token + of < rows && first_column + column < width) {
          *reinterpret_cast<uint4*>(y + (first_token + of) * width + first_column + column) =
              *reinterpret_cast<const uint4*>(tile + of * pitch + column);
        }
      }
      return;
    }
    constexpr int pitch = kRows + 4;
    static_assert(4 * kTile * pitch <= kCount * (kTileBytes<kTile> + kWeightBytes));
    float* const tile = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) {
      const int which = i >> 1 & 1;
      tile[token_of_sum(thread, i) * pitch + columns[which]] = sums[i] + bias[which];
    }
    cluster_barrier();
    for (int i = blockIdx.z * kThreads + thread; i < kTile * (kRows / 8); i += gridDim.z * kThreads) {
      const int of = i / (kRows / 8), column = i % (kRows / 8) * 8;
      if (first_token + of >= rows || first_column + column >= width) continue;
      float total[8] = {};
      for (unsigned part = 0; part < gridDim.z; ++part) {
        const uint32_t from = shared_of(in_group + shared * part, x + 4 * (of * pitch + column));
        const float4 low = load_cluster(from), high = load_cluster(from + 16);
        const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) total[j] += more[j];
      }
      *reinterpret_cast<uint4*>(y + (first_token + of) * width + first_column + column) = {
          packed_pair(total[0], total[1], T{}), packed_pair(total[2], total[3], T{}),
          packed_pair(total[4], total[5], T{}), packed_pair(total[6], total[7], T{})};
    }
  }

  // By all threads of a warp that does not write, where the others do.
  __device__ __forceinline__ void do_not_write() const {
    if (gridDim.z > 1) cluster_barrier();
  }
  // By all threads at the end: others may still read what this block has, or say here that they have read x.
  __device__ __forceinline__ void end() const {
    if (!alone) cluster_barrier();
  }
};

#endif

}  // namespace harlora::cuda::gemm90
