// The layer for at most 8 rows of x, written to take as long as reading the packed weight: t = x·lora_Aᵀ is a small
// kernel of its own that runs beside the large one, which asks for t when it has read its part of the weight.

#include "qlora_gemv.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

#include "launch.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "ptx.cuh"
#include "qlora_gemv.h"
#include "types.cuh"

namespace harlora::cuda {
namespace {

using gemv::kProducts;
using gemv::kRows;
using gemv::kStages;
using gemv::kStep;
using gemv::kThreads;
using gemv::kTokens;
using gemv::kUnits;
using gemv::kWarps;

constexpr int kFewTokens = gemv::most_tokens(1);  // up to which a tile has 16 rows of the weight; of more, 32
constexpr int kBlocks = 2;                        // of threads, on a multiprocessor at a time
static_assert(gemv::most_tokens(2) == kTokens && kThreads == 2 * kPairs);

template <typename T>
struct Arguments {
  const T* x;
  const uint8_t* packed;
  const void* absmax;
  const float* code;
  const T* bias;
  const void* A;  // T, or float if `wide`
  const void* B;
  const float* nested_absmax;
  const float* nested_offset;
  const float* nested_code;
  T* y;
  T* t;
  int in_features;
  int out_features;
  int tokens;
  int rank;
  int shift;  // log2(blocksize)
  float scaling;
  bool wide;

  // What follows from these, and the compiler would compute in each thread.
  int row_bytes;      // of codes
  int row_blocks;     // of a scale each
  int steps;          // in a row,
  int pieces;         // and pieces;
  int end;            // those of a tile, with what there is not of them
  int tiles;
};

// Of one value of y, the product of a row of t and a row of lora_B.
template <typename T>
__device__ __forceinline__ float of_adapter(const Arguments<T>& a, int token, int64_t row) {
  const T* const t = a.t + token * a.rank;
  const int64_t first = row * a.rank;
  float sum = 0;
  if (a.rank % 8 == 0 && (reinterpret_cast<uintptr_t>(a.B) | reinterpret_cast<uintptr_t>(a.t)) % 16 == 0) {
#pragma unroll 2
    for (int i = 0; i < a.rank; i += 8) {
      const uint4 of_B = a.wide ? eight<T, true>(a.B, first + i) : eight<T, false>(a.B, first + i);
      const uint4 of_t = eight<T, false>(t, i);
      const auto add = [&](uint32_t pair_of_t, uint32_t pair_of_B) {
        const float2 one = unpacked(pair_of_t, T{}), other = unpacked(pair_of_B, T{});
        sum += one.x * other.x;
        sum += one.y * other.y;
      };
      add(of_t.x, of_B.x);
      add(of_t.y, of_B.y);
      add(of_t.z, of_B.z);
      add(of_t.w, of_B.w);
    }
    return sum;
  }
  for (int i = 0; i < a.rank; ++i) {
    const T B = a.wide ? rounded<T>(static_cast<const float*>(a.B)[first + i]) : static_cast<const T*>(a.B)[first + i];
    sum += static_cast<float>(t[i]) * static_cast<float>(B);
  }
  return sum;
}

// What a warp needs of its next pieces is on its way as asynchronous copies: loads into registers would be counted
// together, by one of the six counters that a warp has, and each piece would wait for the newest of them. Scales are
// the only such loads; what a lane has read of them the others of its group find in shared memory.
//
// Each warp waits some hundred cycles for shared memory in each piece: there are as many warps as registers allow.
template <typename T, bool kNested, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocks) qlora_gemv_kernel(const Arguments<T> a) {
  constexpr int kTileRows = kTiles * kRows, kSteps = gemv::steps_of_piece(kTiles);
  constexpr int kTokenBytes = gemv::token_bytes(kTiles), kChunks = kTokenBytes / 16, kCopyTokens = 32 / kChunks;
  constexpr int kPieceCodes = kSteps * kStep / 2;  // in bytes
  // A stage is filled again as soon as it was read, or only with the next: sums of a tile then go where its x was.
  constexpr bool kAtOnce = gemv::has_parts(kTiles);
  const int lane = threadIdx.x % 32, group = lane >> 2, column = lane & 3;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // so the compiler knows it is one for all lanes
  const int steps = a.steps, pieces = a.pieces, end = a.end, tiles = a.tiles, tokens = a.tokens;
  const int shift = a.shift - 6;  // log2 of the steps of a block
  const uint32_t shared = address_of_shared(dynamic_shared());
  const uint32_t bytes_of_x = tokens * kTokenBytes;  // of a piece
  const uint32_t nested_code = shared + gemv::kTableBytes;
  const uint32_t all_scales = nested_code + (kNested ? gemv::kNestedBytes : 0);
  const uint32_t ring = all_scales + kWarps * gemv::kScaleBytes;
  const uint32_t x_of_warp = ring + warp * kStages * bytes_of_x;

  // What the tables are made of comes nearer while the first pieces are asked for, and only then is waited for. Two
  // threads write the copies of a pair.
  const int pair_of_thread = threadIdx.x >> 1;
  prefetch(a.code + (threadIdx.x & 15));
  if constexpr (kNested) prefetch(a.nested_code + pair_of_thread);

  // Where a lane copies to. What is held in registers by an empty asm the compiler would compute anew for each piece.
  uint32_t codes_to = shared + gemv::place_of_copy(warp, lane, 0);
  uint32_t other_codes_to = shared + gemv::place_of_copy(warp, lane, 1);
  const int token = lane / kChunks, chunk = lane % kChunks;
  uint32_t x_to = x_of_warp + gemv::place_of_x(kTiles, token, chunk);
  asm volatile("" : "+r"(codes_to), "+r"(other_codes_to), "+r"(x_to));

  // The tile and the piece that are copied next.
  int ahead_tile = blockIdx.x, ahead = warp, rows_left = 0;
  const uint8_t* codes = nullptr;
  const T* x = nullptr;
  const float* first_scale = nullptr;
  [[maybe_unused]] uint32_t first_block = 0;
  int step_of_scale = 0;
  const int first_code = 16 * gemv::chunk_of_copy(kTiles, lane) + warp * kPieceCodes;
  const auto begin_tile = [&] {
    if (ahead_tile >= tiles) {
      ahead = end;  // no piece is there
      return;
    }
    const int row = ahead_tile * kTileRows + gemv::row_of_copy(kTiles, lane);
    rows_left = a.out_features - row;
    codes = a.packed + static_cast<int64_t>(row) * a.row_bytes + first_code;
    x = a.x + static_cast<int64_t>(token) * a.in_features + 8 * chunk + warp * kSteps * kStep;
    const int row_of_scale = min(ahead_tile * kTileRows + gemv::row_of_scale(kTiles, lane), a.out_features - 1);
    first_block = static_cast<uint32_t>(row_of_scale) * a.row_blocks;
    if constexpr (!kNested) first_scale = static_cast<const float*>(a.absmax) + first_block;
    step_of_scale = warp * kSteps + gemv::step_of_scale(kTiles, lane);
  };
  float scales[kStages] = {};
  [[maybe_unused]] int numbers[kStages] = {};
  const auto copy = [&](int stage) {
    if (ahead < pieces) {
      const bool whole = kSteps == 1 || ahead * kSteps + 1 < steps;  // or the second step is not there
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        copy_once((i ? other_codes_to : codes_to) + gemv::kGroupBytes * stage, codes + int64_t{8 * i} * a.row_bytes,
                  (whole || column < 2) && 8 * i < rows_left);
      }
#pragma unroll
      for (int i = 0; i < gemv::most_tokens(kTiles); i += kCopyTokens) {
        if (i + token < tokens) {
          copy_async(x_to + stage * bytes_of_x + i * kTokenBytes, x + int64_t{i} * a.in_features, whole || chunk < 8);
        }
      }
      const int block_of_row = min(step_of_scale, steps - 1) >> shift;
      if constexpr (kNested) {
        const uint32_t block = first_block + block_of_row;
        numbers[stage] = static_cast<const uint8_t*>(a.absmax)[block];
        scales[stage] = a.nested_absmax[block >> 8];
      } else {
        scales[stage] = first_scale[block_of_row];
      }
      codes += kWarps * kPieceCodes;
      x += kWarps * kSteps * kStep;
      step_of_scale += kWarps * kSteps;
    }
    copy_commit();
    ahead += kWarps;
    if (stage == kStages - 1 && ahead >= end) {  // a tile's last piece has the last stage
      ahead_tile += gridDim.x;
      ahead = warp;
      begin_tile();
    }
  };
  begin_tile();
#pragma unroll
  for (int i = 0; i < (kAtOnce ? kStages : kStages - 1); ++i) copy(i);

  // The table is written while the first pieces are on their way, 16 bytes at a time and neighbours to other banks.
  __syncwarp();  // or the compiler has these loads, and the wait for them, before the copies
  const uint32_t pair = packed_pair(a.code[pair_of_thread >> 4], a.code[pair_of_thread & 15], T{});
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk_of_pair = 4 * (threadIdx.x & 1) + ((pair_of_thread + i) & 3);
    store_shared_16(shared + gemv::kPairBytes * pair_of_thread + 16 * chunk_of_pair, {pair, pair, pair, pair});
  }
  if constexpr (kNested) {  // both threads the same
    store_shared(nested_code + 4 * pair_of_thread, __float_as_uint(a.nested_code[pair_of_thread]));
  }
  __syncthreads();

  // Of the first half and unit, and of the first values of x: the other places differ in a bit or two.
  uint32_t codes_at = gemv::place_of_codes(warp, lane, 0, 0), x_at = gemv::place_of_x(kTiles, group, 2 * column);
  uint32_t own_copy = 4 * lane;
  const uint32_t own_scale = all_scales + gemv::kScaleBytes * warp;
  asm volatile("" : "+r"(codes_at), "+r"(x_at), "+r"(own_copy));
  const auto pair_of_byte = [&](uint32_t word, int which) {
    return load_shared(shared + gemv::place_of_pair(word, which, own_copy));
  };
  const bool has_token = group < tokens;
  [[maybe_unused]] const float offset = kNested ? *a.nested_offset : 0.0f;
  [[maybe_unused]] int turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int first_row = tile * kTileRows;
    if (threadIdx.x < kTileRows && first_row + static_cast<int>(threadIdx.x) < a.out_features) {  // while codes come
      const int row = first_row + threadIdx.x;
      if (a.rank) prefetch(static_cast<const uint8_t*>(a.B) + static_cast<int64_t>(row) * a.rank * (a.wide ? 4 : 2));
      if (a.bias) prefetch(a.bias + row);
    }
    float total[kTiles][4] = {};
    for (int first = warp; first < end; first += kWarps * kStages) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        copy_wait<kAtOnce ? kStages - 1 : kStages - 2>();
        __syncwarp();  // all have copied this stage, and read the one before
        float own = scales[stage];
        if constexpr (kNested) {
          own = nested_scale(__uint_as_float(load_shared(nested_code + 4 * numbers[stage])), own, offset);
        }
        store_shared(own_scale + own_copy, __float_as_uint(own));
        __syncwarp();
        if constexpr (!kAtOnce) copy((stage + 1) % kStages);
        if (first + stage * kWarps < pieces) {
          const uint4 four = load_shared_16(own_scale + (own_copy & ~15u));
          const float scale[4] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                                  __uint_as_float(four.w)};  // by half and unit
          uint32_t words[kUnits][2][2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint2 two = load_shared_8(shared + (codes_at ^ 32 * i) + gemv::kGroupBytes * stage);
            words[i & 1][i >> 1][0] = two.x;
            words[i & 1][i >> 1][1] = two.y;
          }
          uint4 low{}, high{};
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit) {
            const int step = unit % kSteps, of = unit / kSteps;
            if (of == 0 && has_token) {
              const uint32_t from = x_of_warp + stage * bytes_of_x + step * (kTokenBytes / kSteps);
              low = load_shared_16(from + x_at);
              high = load_shared_16(from + (x_at ^ 16));
            }
            if (kAtOnce && unit == kUnits - 1) {
              __syncwarp();
              copy(stage);
            }
            const uint32_t values_of_x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            float sums[4] = {};
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
              uint32_t weights[4], of_tokens[2];
              gemv::operand_of_pairs(pair_of_byte, words[unit][0], words[unit][1], product, weights);
              gemv::token_operand(values_of_x, product, of_tokens);
              multiply_add<T>(sums, weights, of_tokens);
            }
            gemv::add_scaled(total[of], sums, scale[unit], scale[2 + unit]);
          }
        } else if constexpr (kAtOnce) {
          copy(stage);
        }
      }
    }
    const auto parts = [&](int of_warp) {
      if constexpr (gemv::has_parts(kTiles)) {
        return ring + kWarps * kStages * bytes_of_x + (turn * kWarps + of_warp) * gemv::part_bytes(kTiles, tokens);
      } else {  // where x of the last stage was, which is not yet on its way again
        return ring + (of_warp * kStages + kStages - 1) * bytes_of_x;
      }
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int of_sum = gemv::token_of_sum(lane, i), of_row = kRows * (i >> 2) + gemv::row_of(lane, i >> 1 & 1);
      if (of_sum < tokens) {
        store_shared(parts(warp) + 4 * (of_sum * kTileRows + of_row), __float_as_uint(total[i >> 2][i & 3]));
      }
    }
    __syncthreads();
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // or what follows from it is held in registers all the time
    const int of_token = thread / kTileRows;
    const int row = first_row + thread % kTileRows;
    const bool has_value = of_token < tokens && row < a.out_features;
    float sum = 0;
    if (has_value) {
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += __uint_as_float(load_shared_4(parts(i) + 4 * thread));
      if (a.bias) sum += static_cast<float>(a.bias[row]);
    }
    if constexpr (gemv::has_parts(kTiles)) {
      turn ^= 1;  // the next sums but one are written when all have come to the next barrier
    } else {
      __syncthreads();
    }
    if (has_value) {
      if (a.rank) wait_for_previous();
      const float adapter = a.rank ? of_adapter(a, of_token, row) : 0.0f;
      a.y[static_cast<int64_t>(of_token) * a.out_features + row] = rounded<T>(sum + a.scaling * adapter);
    }
  }
}

template <typename T, bool kNested, int kTiles>
void launch(Arguments<T> a, int multiprocessors, cudaStream_t stream) {
  constexpr const char* name = "qlora_gemv";
  if (a.rank) lora_down(name, a.x, a.A, a.wide, a.t, a.in_features, a.tokens, a.rank, stream);
  constexpr int kSteps = gemv::steps_of_piece(kTiles);
  a.row_bytes = a.in_features / 2;
  a.row_blocks = a.in_features >> a.shift;
  a.steps = a.in_features / kStep;
  a.pieces = (a.steps + kSteps - 1) / kSteps;
  a.end = gemv::rounds(a.pieces) * kWarps;
  a.tiles = (a.out_features + kTiles * kRows - 1) / (kTiles * kRows);
  // A block of the kernel before takes the place of one of this, which would begin when that ends, after all others.
  const int before = a.rank ? std::min(down_blocks(a.tokens, a.rank), multiprocessors) : 0;
  constexpr size_t kMost = gemv::shared_bytes(kTiles, gemv::most_tokens(kTiles), kNested);
  static_assert(kMost <= 99 * 1024);  // what a block may take of 8.6 and 8.9
  launch_kernel(name, qlora_gemv_kernel<T, kNested, kTiles>,
                {.grid = dim3(static_cast<unsigned>(std::min(a.tiles, kBlocks * multiprocessors - before))),
                 .threads = kThreads,
                 .stream = stream,
                 .dynamic_bytes = static_cast<size_t>(gemv::shared_bytes(kTiles, a.tokens, kNested)),
                 .most_dynamic_bytes = kMost,
                 .early = a.rank > 0},
                a);
}

template <typename T>
void launch(const Arguments<T>& a, bool nested, cudaStream_t stream) {
  const int count = multiprocessors("qlora_gemv");
  if (a.tokens <= kFewTokens) {
    nested ? launch<T, true, 1>(a, count, stream) : launch<T, false, 1>(a, count, stream);
  } else {
    nested ? launch<T, true, 2>(a, count, stream) : launch<T, false, 2>(a, count, stream);
  }
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace

void qlora_gemv(Tensor x, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, std::optional<Tensor> bias,
                std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, double scaling, Tensor y, Tensor t,
                std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_offset,
                std::optional<Tensor> nested_code, int64_t stream_handle) {
  const LayerFacts facts = checked_layer("qlora_gemv", x, packed, absmax, code, blocksize, bias, lora_A, lora_B, y, t,
                                         nested_absmax, nested_offset, nested_code);
  STD_TORCH_CHECK(facts.rows <= kTokens, "qlora_gemv: x must have 1 to 8 rows");
  STD_TORCH_CHECK(std::max(facts.in_features, facts.out_features) <= INT32_MAX - 32 && absmax.numel() <= UINT32_MAX,
                  "qlora_gemv: the weight is too large");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const auto run = [&]<typename T>(T) {
    launch(Arguments<T>{static_cast<const T*>(x.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
                        absmax.data_ptr(), static_cast<const float*>(code.data_ptr()), pointer<T>(bias),
                        pointer<void>(lora_A), pointer<void>(lora_B), pointer<float>(nested_absmax),
                        pointer<float>(nested_offset), pointer<float>(nested_code), static_cast<T*>(y.data_ptr()),
                        static_cast<T*>(t.data_ptr()), static_cast<int>(facts.in_features),
                        static_cast<int>(facts.out_features), static_cast<int>(facts.rows),
                        static_cast<int>(facts.rank), facts.shift, static_cast<float>(scaling), facts.wide, 0, 0, 0, 0,
                        0, 0},
           facts.nested, reinterpret_cast<cudaStream_t>(stream_handle));
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace harlora::cuda
