// The gradient of the layer's input for many rows on Hopper, from the packed weight, by the loop of gemm_sm90.cuh. Codes
// become the first operand of wgmma in registers by the table of byte pairs; permutes alone, eleven instructions for two
// bytes, were slower. Two warps beside the thread that copies read the scales, a step ahead. u·lora_A, u =
// scaling·dY·lora_B from lora_low.cuh, is one more step of the same sums.

#include "qlora_dx_sm90.h"

#include "gemm_sm90.cuh"
#include "lora_low.cuh"
#include "nf4.cuh"
#include "qlora_dx_sm90.cuh"

namespace harlora::cuda {
namespace {

using namespace dx90;
using gemm90::kAllThreads;
using gemm90::kFewRegisters;
using gemm90::kManyRegisters;
using gemm90::kStages;
using gemm90::kThreads;

constexpr int kTile = 256;

template <typename T>
struct Arguments {
  CUtensorMap grad;    // (rows, out_features)
  CUtensorMap packed;  // (out_features, in_features / 2) bytes
  const void* absmax;
  const float* code;
  const void* A;  // T, or float if `wide`
  const T* u;
  const float* nested_absmax;
  const float* nested_offset;
  const float* nested_code;
  T* grad_x;
  int64_t in_features;
  int64_t out_features;
  int rows;
  int rank;
  int shift;   // log2(blocksize)
  int steps;   // of a part
  int shared;  // as gemm_sm90.cuh says
  bool wide;
};

template <typename T, bool kNested>
__global__ void __launch_bounds__(kAllThreads, 1) qlora_dx_sm90_kernel(const __grid_constant__ Arguments<T> a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Stages = gemm90::Stages<kTile>;
  extern __shared__ uint8_t dynamic[];
  alignas(16) __shared__ uint32_t table[kPairWords];
  alignas(16) __shared__ uint16_t scales[kStages<kTile>][kScales];
  __shared__ uint64_t barriers[2 * kStages<kTile>];
  __shared__ uint16_t values[16];
  __shared__ float nested_code[kNested ? 256 : 1];
  const int thread = threadIdx.x;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first_token = blockIdx.y * kTile, begin = blockIdx.z * a.steps;
  const int count = min(a.steps, static_cast<int>((a.out_features + kStep - 1) / kStep) - begin);
  if (thread < 16) values[thread] = pattern(rounded<T>(a.code[thread]));
  if (kNested && thread < 256) nested_code[thread] = a.nested_code[thread];
  const Stages stages(dynamic, barriers, a.shared, 1 + kScaleWarps);

  if (thread >= kThreads) {
    give_registers<kFewRegisters>();
    const int warp = (thread - kThreads) / 32;
    if (thread == kThreads) {
      stages.copy(a.grad, begin, count, first_token, [&](int step, uint32_t to, uint32_t barrier) {
        copy_tile(to, a.packed, static_cast<int>(first_column / 2), step * kStep, barrier);
      });
    } else if (warp > 0 && warp <= kScaleWarps) {
      const int row = thread - kThreads - 32;
      const int64_t blocks = a.in_features >> a.shift;
      const float offset = kNested ? *a.nested_offset : 0.0f;
      float fetched[kHalves] = {};
      int numbers[kHalves];
      const auto fetch = [&](int step) {
        const int64_t of = static_cast<int64_t>(step) * kStep + row;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const int64_t column = first_column + 64 * half, block = of * blocks + (column >> a.shift);
          const bool there = of < a.out_features && column < a.in_features;
          numbers[half] = -1;
          fetched[half] = 0.0f;
          if (!there) continue;
          if constexpr (kNested) {
            numbers[half] = static_cast<const uint8_t*>(a.absmax)[block];
            fetched[half] = a.nested_absmax[block >> 8];
          } else {
            fetched[half] = static_cast<const float*>(a.absmax)[block];
          }
        }
      };
      fetch(begin);
      int stage = 0;
      uint32_t parity = 1;
      for (int step = begin; step < begin + count; ++step) {
        T high[kHalves], lacking[kHalves];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float scale = fetched[half];
          if constexpr (kNested) {
            scale = numbers[half] < 0 ? 0.0f : nested_scale(nested_code[numbers[half]], scale, offset);
          }
          split(scale, high[half], lacking[half]);
        }
        fetch(step + 1);
        barrier_wait(stages.empty(stage), parity);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          uint16_t* const to = scales[stage] + place_of_scale(half, row);
          to[0] = pattern(high[half]);
          to[kLacking] = pattern(lacking[half]);
        }
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive_here(stages.full(stage));
        Stages::advance(stage, parity);
      }
    }
    __syncwarp();
    stages.do_not_write();
  } else {
    take_registers<kManyRegisters>();
    const int columns[2] = {column_of(thread), column_of(thread) + 1};
    write_pairs<kThreads>(table, values, thread);
    stages.sync();
    const int half = thread >> 7;
    uint32_t copy = address_of_shared(table) + 4 * (thread & 31);
    asm volatile("" : "+r"(copy));
    uint32_t codes_at = 0, scales_at = 0;
    // The rows of a product lie as the first product's, 16 rows further on.
    const uint32_t of_thread = stages.codes + place_of_byte(row_of(thread, 0, 0), columns[0] / 2);
    uint32_t of_scales = address_of_shared(scales) + 2 * place_of_scales(half, 0, thread);
    asm volatile("" : "+r"(of_scales));  // or the compiler computes it anew in each step
    // What is asked for a product ahead, of the first of a step before the last of the step before.
    uint32_t bytes[2][4];
    uint4 scale[2];
    const auto load = [&](int product) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bytes[product & 1][i] = load_shared_1(codes_at + kRowBytes * (16 * product + 8 * (i >> 1) + (i & 1)));
      }
      scale[product & 1] = load_shared_16(scales_at + 2 * 8 * 4 * product);
    };
    float sums[kTile / 2] = {};
    stages.multiply<T>(
        sums, count,
        [&](int, int stage) {
          codes_at = of_thread + stage * gemm90::kWeightBytes;
          scales_at = of_scales + 2 * stage * kScales;
          load(0);
        },
        [](int) {},
        [&](int product, uint32_t(&weights)[4]) {
          if (product + 1 < kProducts) load(product + 1);
          const uint32_t(&four)[4] = bytes[product & 1];
          const uint4& by = scale[product & 1];
          const uint32_t rows =
              permuted(permuted(four[0], four[1], 0x0040), permuted(four[2], four[3], 0x0040), 0x5410);
          const uint32_t codes = codes_of_pairs(rows);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t pair = load_shared(pair_address(codes, pair_of_byte(i), copy));
            weights[i] = i < 2 ? scaled_pair(pair, by.x, by.y, T{}) : scaled_pair(pair, by.z, by.w, T{});
          }
        });

    const int padded = blockIdx.z ? 0 : static_cast<int>(padded_rank(a.rank));
    if (padded) wait_for_previous();
    stages.add_adapter(sums, a.u, padded, padded, first_token, a.rows, [&](int which, int of) {
      const int64_t column = first_column + columns[which];
      if (of >= a.rank || column >= a.in_features) return 0.0f;
      const int64_t place = of * a.in_features + column;
      return a.wide ? static_cast<const float*>(a.A)[place] : static_cast<float>(static_cast<const T*>(a.A)[place]);
    });
    stages.write(sums, {0.0f, 0.0f}, columns, a.grad_x, a.rows, a.in_features, first_token, first_column);
  }
  stages.end();
#endif
}

constexpr const char* kName = "qlora_dx";

template <typename T>
void launch(const ManyRows& given, int parts, cudaStream_t stream) {
  const gemm90::Cluster cluster(given.in_features, parts);
  const int64_t steps = (given.out_features + kStep - 1) / kStep;
  Arguments<T> a{};
  a.grad = matrix_of_tiles(kName, given.grad, sizeof(T), given.rows, given.out_features, kTile / cluster.shared, 128);
  a.packed = matrix_of_tiles(kName, given.packed, 1, given.out_features, given.in_features / 2, kStep, kRowBytes);
  a.absmax = given.absmax;
  a.code = given.code;
  a.A = given.A;
  a.u = static_cast<const T*>(given.u);
  a.nested_absmax = given.nested_absmax;
  a.nested_offset = given.nested_offset;
  a.nested_code = given.nested_code;
  a.grad_x = static_cast<T*>(given.grad_x);
  a.in_features = given.in_features;
  a.out_features = given.out_features;
  a.rows = given.rows;
  a.rank = given.rank;
  a.shift = given.shift;
  a.steps = static_cast<int>((steps + parts - 1) / parts);
  a.shared = cluster.shared;
  a.wide = given.wide;
  STD_TORCH_CHECK((parts - int64_t{1}) * a.steps < steps, kName, ": each part needs a step of ", kStep, " rows");
  launch_kernel(kName, given.nested_code ? qlora_dx_sm90_kernel<T, true> : qlora_dx_sm90_kernel<T, false>,
                {.grid = dim3(cluster.tiles, static_cast<unsigned>((a.rows + kTile - 1) / kTile),
                              static_cast<unsigned>(parts)),
                 .threads = kAllThreads,
                 .stream = stream,
                 .dynamic_bytes = gemm90::kDynamicBytes<kTile>,
                 .cluster = true,
                 .cluster_x = static_cast<unsigned>(cluster.shared),
                 .early = a.rank > 0},
                a);
}

}  // namespace

void qlora_dx_sm90(const ManyRows& given, int parts, cudaStream_t stream) {
  check_hopper(kName);
  if (given.bfloat16) {
    launch<__nv_bfloat16>(given, parts, stream);
  } else {
    launch<__half>(given, parts, stream);
  }
}

}  // namespace harlora::cuda
