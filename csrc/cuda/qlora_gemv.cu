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
using gemv::kStep;
using gemv::kSteps;
using gemv::kThreads;
using gemv::kTokens;
using gemv::kWarps;

constexpr int kFewTokens = 4;  // up to which a tile has 16 rows of the weight; of more, 32, which halves what x takes
constexpr int kBlocks = 2;     // of threads, on a multiprocessor at a time
static_assert(kFewTokens <= gemv::most_tokens(1) && kThreads == kPairs);

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
  int64_t in_features;
  int64_t out_features;
  int tokens;
  int rank;
  int shift;  // log2(blocksize)
  float scaling;
  bool wide;
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
// together, by one of the six counters that a warp has, and each piece would wait for the newest of them. Scales, the
// only such loads, are waited for before the next are asked for.
template <typename T, bool kNested, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocks) qlora_gemv_kernel(const Arguments<T> a) {
  constexpr int kStages = gemv::stages(kTiles), kTileRows = kTiles * kRows;
  const int lane = threadIdx.x % 32, group = lane >> 2, column = lane & 3;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // so the compiler knows it is one for all lanes
  const int in_features = static_cast<int>(a.in_features), steps = in_features / kStep, tokens = a.tokens;
  const int shift = a.shift - 6;  // log2 of the steps of a block
  const int pieces = (steps + kSteps - 1) / kSteps;
  const int tiles = static_cast<int>((a.out_features + kTileRows - 1) / kTileRows);
  const int end = gemv::rounds(pieces, kStages) * kWarps;  // of the pieces of a tile, with what there is not of them
  const uint32_t shared = address_of_shared(dynamic_shared());
  const uint32_t bytes_of_x = tokens * gemv::kTokenBytes;  // of a piece
  const uint32_t nested_code = shared + gemv::kTableBytes, ring = nested_code + (kNested ? gemv::kNestedBytes : 0);
  const uint32_t x_of_warp = ring + warp * kStages * bytes_of_x;

  // Where a lane copies to. What is held in registers by an empty asm the compiler would compute anew for each piece.
  uint32_t codes_to = shared + gemv::place_of_copy(warp, kTiles, 0, lane, 0);
  uint32_t other_codes_to = shared + gemv::place_of_copy(warp, kTiles, 0, lane, 1);
  const int token = lane >> 4, chunk = lane & 15;
  uint32_t x_to = x_of_warp + gemv::place_of_x(token, chunk);
  const T* x = a.x + token * a.in_features + 8 * chunk;
  asm volatile("" : "+r"(codes_to), "+r"(other_codes_to), "+r"(x_to), "+l"(x));

  // The tile and the piece that are copied next.
  int ahead_tile = blockIdx.x, ahead = warp, rows_left = 0;
  const uint8_t* codes = nullptr;
  uint32_t first_block = 0;
  const uint32_t row_blocks = static_cast<uint32_t>(in_features >> a.shift);
  const auto begin_tile = [&] {
    if (ahead_tile >= tiles) {
      ahead = end;  // no piece is there
      return;
    }
    const int64_t first_row = static_cast<int64_t>(ahead_tile) * kTileRows + group;
    rows_left = static_cast<int>(min(a.out_features - first_row, int64_t{kTileRows}));
    codes = a.packed + (first_row * a.in_features + gemv::kCopyCodes * column) / 2;
    first_block = static_cast<uint32_t>(first_row + gemv::rows_to_scale(lane)) * row_blocks;
  };
  float scales[kStages][kTiles] = {};
  [[maybe_unused]] int numbers[kStages][kTiles] = {};
  const auto copy = [&](int stage) {
    if (ahead < pieces) {
      const int k = ahead * kSteps * kStep;
      const bool whole = k + kStep < in_features;  // or the second step is not there
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        copy_once((i & 1 ? other_codes_to : codes_to) + gemv::kGroupBytes * (stage * kTiles + (i >> 1)),
                  codes + k / 2 + i * 4 * a.in_features, (whole || column < 2) && 8 * i < rows_left);
      }
#pragma unroll
      for (int i = 0; i < gemv::most_tokens(kTiles); i += 2) {
        if (i + token < tokens) {
          copy_async(x_to + stage * bytes_of_x + i * gemv::kTokenBytes, x + k + i * a.in_features, whole || chunk < 8);
        }
      }
      const int step = min(ahead * kSteps + gemv::step_of_scale(lane), steps - 1);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint32_t block = first_block + i * kRows * row_blocks + (step >> shift);
        if (i * kRows + gemv::rows_to_scale(lane) >= rows_left) {  // the last scale that was read does for no row
        } else if constexpr (kNested) {
          numbers[stage][i] = static_cast<const uint8_t*>(a.absmax)[block];
          scales[stage][i] = a.nested_absmax[block >> 8];
        } else {
          scales[stage][i] = static_cast<const float*>(a.absmax)[block];
        }
      }
    }
    copy_commit();
    ahead += kWarps;
    if (stage == kStages - 1 && ahead >= end) {  // a tile's last piece has the last stage
      ahead_tile += gridDim.x;
      ahead = warp;
      begin_tile();
    }
  };
  // Scales of a tile, all in one piece of memory, come into the second cache before a warp asks for its own.
  const auto prefetch_scales = [&](int tile) {
    constexpr int64_t kLine = 128, kSize = kNested ? 1 : 4;
    const int64_t first = static_cast<int64_t>(tile) * kTileRows, size = kSize * row_blocks;
    const int64_t bytes = min(a.out_features - first, int64_t{kTileRows}) * size;  // below 0 past the last tile
    const uint8_t* const from = static_cast<const uint8_t*>(a.absmax) + first * size;
#pragma unroll 1
    for (int64_t i = kLine * threadIdx.x; i < bytes; i += kLine * kThreads) prefetch(from + i);
  };
  // What the tables are made of is asked for before all else.
  uint32_t even = __float_as_uint(a.code[threadIdx.x >> 4]), odd = __float_as_uint(a.code[threadIdx.x & 15]);
  uint32_t nested = kNested ? __float_as_uint(a.nested_code[threadIdx.x]) : 0;
  const float offset = kNested ? *a.nested_offset : 0.0f;
  asm volatile("" : "+r"(even), "+r"(odd), "+r"(nested));
  prefetch_scales(blockIdx.x);
  begin_tile();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(i);

  // The table is written while the first pieces are on their way: each thread writes the copies of one pair, 16 bytes
  // at a time and neighbours to other banks.
  const uint32_t pair = packed_pair(__uint_as_float(even), __uint_as_float(odd), T{});
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    store_shared_16(shared + gemv::kPairBytes * threadIdx.x + 16 * ((threadIdx.x + i) & 7), {pair, pair, pair, pair});
  }
  if constexpr (kNested) store_shared(nested_code + 4 * threadIdx.x, nested);
  __syncthreads();

  uint32_t codes_at[4];  // by half and step, of the first tile and stage
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes_at[i] = shared + gemv::place_of_codes(warp, lane, i >> 1, i & 1);
    asm volatile("" : "+r"(codes_at[i]));
  }
  uint32_t x_at = x_of_warp + gemv::place_of_x(group, 2 * column);
  uint32_t next_x_at = x_of_warp + gemv::place_of_x(group, 2 * column + 1);
  uint32_t own_copy = 4 * lane;
  asm volatile("" : "+r"(x_at), "+r"(next_x_at), "+r"(own_copy));
  const auto pair_of_byte = [&](uint32_t word, int which) {
    return load_shared(shared + gemv::place_of_pair(word, which, own_copy));
  };
  const bool has_token = group < tokens;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = static_cast<int64_t>(tile) * kTileRows;
    if (threadIdx.x < kTileRows && first_row + threadIdx.x < a.out_features) {  // they come while the weight is read
      const int64_t row = first_row + threadIdx.x;
      if (a.rank) prefetch(static_cast<const uint8_t*>(a.B) + row * a.rank * (a.wide ? 4 : 2));
      if (a.bias) prefetch(a.bias + row);
    }
    prefetch_scales(tile + gridDim.x);
    float total[kTiles][4] = {};
    for (int first = warp; first < end; first += kWarps * kStages) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        copy_wait<kStages - 2>();
        __syncwarp();  // all have copied this stage, and read the one before
        float scale[kTiles][4];  // by half and step
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          float own = scales[stage][i];
          if constexpr (kNested) {
            own = nested_scale(__uint_as_float(load_shared(nested_code + 4 * numbers[stage][i])), own, offset);
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) scale[i][j] = __shfl_sync(0xFFFFFFFFu, own, j, 4);
        }
        copy((stage + kStages - 1) % kStages);
        if (first + stage * kWarps >= pieces) continue;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint4 low{}, high{};
          if (has_token) {
            const uint32_t from = stage * bytes_of_x + step * (gemv::kTokenBytes / kSteps);
            low = load_shared_16(x_at + from);
            high = load_shared_16(next_x_at + from);
          }
          const uint32_t values_of_x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint32_t from = gemv::kGroupBytes * (stage * kTiles + i);
            const uint2 one = load_shared_8(codes_at[step] + from), other = load_shared_8(codes_at[2 + step] + from);
            const uint32_t words[2] = {one.x, one.y}, other_words[2] = {other.x, other.y};
            float sums[4] = {};
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
              uint32_t weights[4], of_tokens[2];
              gemv::operand_of_pairs(pair_of_byte, words, other_words, product, weights);
              gemv::token_operand(values_of_x, product, of_tokens);
              multiply_add<T>(sums, weights, of_tokens);
            }
            gemv::add_scaled(total[i], sums, scale[i][step], scale[i][2 + step]);
          }
        }
      }
    }
    // Sums of the warps, where x of the last stage was, which is not yet on its way again.
    const auto parts = [&](int of_warp) { return ring + (of_warp * kStages + kStages - 1) * bytes_of_x; };
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
    const int64_t row = first_row + thread % kTileRows;
    const bool has_value = of_token < tokens && row < a.out_features;
    float sum = 0;
    if (has_value) {
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += __uint_as_float(load_shared_4(parts(i) + 4 * thread));
      if (a.bias) sum += static_cast<float>(a.bias[row]);
    }
    __syncthreads();
    if (a.rank) wait_for_previous();
    if (has_value) {
      const float adapter = a.rank ? of_adapter(a, of_token, row) : 0.0f;
      a.y[of_token * a.out_features + row] = rounded<T>(sum + a.scaling * adapter);
    }
  }
}

template <typename T, bool kNested, int kTiles>
void launch(const Arguments<T>& a, int multiprocessors, cudaStream_t stream) {
  constexpr const char* name = "qlora_gemv";
  if (a.rank) lora_down(name, a.x, a.A, a.wide, a.t, a.in_features, a.tokens, a.rank, stream);
  const int64_t tiles = (a.out_features + kTiles * kRows - 1) / (kTiles * kRows);
  constexpr size_t kMost = gemv::shared_bytes(kTiles, gemv::most_tokens(kTiles), kNested);
  static_assert(kMost <= 99 * 1024);  // what a block may take of 8.6 and 8.9
  launch_kernel(name, qlora_gemv_kernel<T, kNested, kTiles>,
                {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, kBlocks * multiprocessors))),
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
  STD_TORCH_CHECK(facts.in_features <= INT32_MAX && absmax.numel() <= UINT32_MAX,
                  "qlora_gemv: the weight is too large");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const auto run = [&]<typename T>(T) {
    launch(Arguments<T>{static_cast<const T*>(x.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
                        absmax.data_ptr(), static_cast<const float*>(code.data_ptr()), pointer<T>(bias),
                        pointer<void>(lora_A), pointer<void>(lora_B), pointer<float>(nested_absmax),
                        pointer<float>(nested_offset), pointer<float>(nested_code), static_cast<T*>(y.data_ptr()),
                        static_cast<T*>(t.data_ptr()), facts.in_features, facts.out_features,
                        static_cast<int>(facts.rows), static_cast<int>(facts.rank), facts.shift,
                        static_cast<float>(scaling), facts.wide},
           facts.nested, reinterpret_cast<cudaStream_t>(stream_handle));
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace harlora::cuda
