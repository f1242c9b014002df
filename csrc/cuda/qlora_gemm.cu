// The layer for some rows of x, by what all GPUs since compute capability 8.0 have: mma.sync and cp.async. Packed
// codes become the first operand in registers, as in qlora_gemv.cu, and a scale multiplies the sum of 64 products.
// Where there are fewer tiles of y than multiprocessors, blocks share the sum over k of a tile; their float32 sums are
// added by a second kernel, always in the same order. t = x·lora_Aᵀ is a small kernel of its own (lora_down.cuh),
// beside which the large one starts.

#include "qlora_gemm.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <type_traits>

#include "launch.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "ptx.cuh"
#include "qlora_gemv.cuh"
#include "sum_parts.cuh"
#include "types.cuh"

namespace harlora::cuda {
namespace {
namespace mma16 {  // tests compile several files of kernels as one

// A block of threads computes kRows columns of y for kTile rows of x ("tokens"): yᵀ = Ŵ·xᵀ, rows of the weight being
// the rows of mma.sync. In each of its two groups of four warps, a warp has 32 of the rows:
//
//   up to 64 tokens   the groups take turns at the steps of 64 along k, each for all tokens, and add up at the end
//   128 tokens        each group has 64 of the tokens, and both take all steps
//
// so that the former decode no weight twice, and an operand, once read, serves as many products as registers allow.
// Codes and x come through a ring of stages in shared memory, of two steps or of one.
constexpr int kRows = 128;
constexpr int kWarpRows = 32;
constexpr int kGroups = 2;
constexpr int kThreads = 256;
constexpr int kStep = gemv::kStep;
constexpr int kProducts = gemv::kProducts;
constexpr int kCodeBytes = kRows * kStep / 2;  // of a step
constexpr int kTableBytes = 4 * kPairWords;
constexpr int kMostParts = 16;
constexpr int kPitch = kRows + 4;  // floats of a token in the tile of sums, which 16 bytes divide
static_assert(kRows == kThreads / 2 && kRows == kWarpRows * kThreads / 32 / kGroups);

template <int kTile>
constexpr bool kShareSteps = kTile <= 64;
template <int kTile>
constexpr int kStageSteps = kShareSteps<kTile> ? kGroups : 1;
template <int kTile>
constexpr int kStageBytes = kStageSteps<kTile> * (kCodeBytes + kTile * kStep * 2);
// 48 KiB, with which two blocks fit on a multiprocessor of 8.0; or 60 KiB, of the 99 that a block has elsewhere.
template <int kTile>
constexpr int kStages = kTile == 128 ? 3 : 48 * 1024 / kStageBytes<kTile>;
template <int kTile>
constexpr int kRingBytes = kStages<kTile> * kStageBytes<kTile>;

template <typename T>
struct Arguments {
  const T* x;
  const uint8_t* packed;
  const void* absmax;
  const float* code;
  const T* bias;
  const T* t;
  const void* B;  // T, or float if `wide`
  const float* nested_absmax;
  const float* nested_offset;
  const float* nested_code;
  T* y;
  float* workspace;  // (parts, rows, out_features)
  int64_t in_features;
  int64_t out_features;
  int rows;
  int rank;
  int shift;  // log2(blocksize)
  int steps;  // of a part
  float scaling;
  bool wide;
  bool fours;  // rows of t and of B may be read by four values
};

// Four values of a row of a 16-bit matrix (rows, columns), zeros past its end.
template <typename T>
__device__ __forceinline__ uint2 four_of(const T* row, int column, int columns, bool fours) {
  if (column >= columns) return {0, 0};
  if (fours) return *reinterpret_cast<const uint2*>(row + column);
  const auto at = [&](int i) { return column + i < columns ? static_cast<float>(row[column + i]) : 0.0f; };
  return {packed_pair(at(0), at(1), T{}), packed_pair(at(2), at(3), T{})};
}

// Of a float32 matrix, rounded.
template <typename T>
__device__ __forceinline__ uint2 four_of(const float* row, int column, int columns, bool) {
  const auto at = [&](int i) { return column + i < columns ? row[column + i] : 0.0f; };
  return {packed_pair(at(0), at(1), T{}), packed_pair(at(2), at(3), T{})};
}

template <typename T, int kTile, bool kNested>
__global__ void __launch_bounds__(kThreads, kTile <= 32 ? 2 : 1) qlora_mma_kernel(const Arguments<T> a) {
  constexpr bool share_steps = kShareSteps<kTile>;
  constexpr int stage_steps = kStageSteps<kTile>, stage_bytes = kStageBytes<kTile>, stages = kStages<kTile>;
  constexpr int x_begin = stage_steps * kCodeBytes, step_bytes_of_x = 2 * kTile * kStep;
  constexpr int warp_tokens = share_steps ? kTile : kTile / kGroups, columns = warp_tokens / gemv::kTokens;
  // Scales are asked for so many stages before they are needed; of larger tiles one stage takes long enough.
  constexpr int ahead = kTile == 16 ? 2 : 1;
  uint8_t* const shared = dynamic_shared();
  const uint32_t ring = address_of_shared(shared);
  float* const nested_code = reinterpret_cast<float*>(shared + kRingBytes<kTile> + kTableBytes);
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);  // so the compiler knows it is one for all lanes
  const int group = warp / 4, warp_row = warp % 4 * kWarpRows;
  const int first_row = blockIdx.x * kRows, last_row = static_cast<int>(a.out_features - 1);
  const int first_token = blockIdx.y * kTile, begin = blockIdx.z * a.steps;
  const int count = min(a.steps, static_cast<int>(a.in_features / kStep) - begin);
  const int of_part = (count + stage_steps - 1) / stage_steps;  // stages
  const int own_step = share_steps ? group : 0;                 // of a stage

  // What a thread copies of each stage, 16 bytes at a time: a chunk of codes of every 64th row, where a stage has two
  // steps, and a chunk of x of every 16th token; or of one row and of every 32nd token. Eight threads beside each other
  // write to all banks. Rows and tokens past the last are read as if they were that, and their results not written.
  constexpr int code_copies = stage_steps, apart = 32 / stage_steps, x_copies = kTile / apart;
  const int code_row = share_steps ? thread / 16 * 4 + thread / 2 % 4 : thread / 2;
  const int code_step = share_steps ? thread / 8 % 2 : 0, x_step = share_steps ? thread / 8 % 2 : 0;
  const int token = thread / (8 * stage_steps), chunk = thread % 8;
  const uint32_t in_features = static_cast<uint32_t>(a.in_features);
  uint32_t codes_from[code_copies], x_from[x_copies];  // bytes and values from the first: pointers take more registers
#pragma unroll
  for (int i = 0; i < code_copies; ++i) {
    const uint32_t row = min(first_row + code_row + 64 * i, last_row);
    codes_from[i] = row * (in_features / 2) + (begin + code_step) * (kStep / 2) + 16 * (thread % 2);
  }
#pragma unroll
  for (int i = 0; i < x_copies; ++i) {
    x_from[i] = min(first_token + token + apart * i, a.rows - 1) * in_features + (begin + x_step) * kStep + 8 * chunk;
    asm volatile("" : "+r"(x_from[i]));  // or the compiler computes it anew for each stage
  }
  const uint32_t codes_to = ring + code_step * kCodeBytes + 32 * code_row + 16 * (thread % 2);
  const uint32_t x_to = ring + x_begin + x_step * step_bytes_of_x + 128 * token + ((chunk ^ (token & 1)) << 4);
  int filled = 0, asked = 0;  // where the next stage goes, in bytes; how many steps were asked for
  const auto load = [&] {
    if (asked + code_step < count) {
#pragma unroll
      for (int i = 0; i < code_copies; ++i) {
        copy_async(codes_to + filled + 2048 * i, a.packed + codes_from[i], true);
        codes_from[i] += stage_steps * kStep / 2;
      }
    }
    if (asked + x_step < count) {
#pragma unroll
      for (int i = 0; i < x_copies; ++i) {
        copy_async(x_to + filled + 128 * apart * i, a.x + x_from[i], true);
        x_from[i] += stage_steps * kStep;
      }
    }
    asked += stage_steps;
    filled = filled + stage_bytes == kRingBytes<kTile> ? 0 : filled + stage_bytes;
    copy_commit();
  };

  // A lane reads the scales of one row of its warp, which the others get from it.
  struct Fetched {
    float scale;
    int number;
  };
  const uint32_t first_block = min(first_row + warp_row + lane, last_row) * (in_features >> a.shift);
  const float offset = kNested ? *a.nested_offset : 0.0f;
  const auto fetch = [&](Fetched& into, int stage) {
    const int step = stage * stage_steps + own_step;
    if (step >= count) return;
    const uint32_t block = first_block + ((begin + step) >> (a.shift - 6));  // a step is 2^6 values
    if constexpr (kNested) {
      into.number = static_cast<const uint8_t*>(a.absmax)[block];
      into.scale = a.nested_absmax[block >> 8];
    } else {
      into.scale = static_cast<const float*>(a.absmax)[block];
    }
  };

#pragma unroll
  for (int i = 0; i < stages - 1; ++i) load();
  Fetched next[ahead] = {};
#pragma unroll
  for (int i = 0; i < ahead; ++i) fetch(next[i], i);
  // The table of nf4.cuh is written while these are on their way: 128 bytes for each pair, by eight threads.
  const uint32_t odd = pattern(rounded<T>(a.code[thread / 8 % 16]));
#pragma unroll
  for (int i = 0; i < kTableBytes / 16 / kThreads; ++i) {
    const uint32_t pair = pattern(rounded<T>(a.code[thread / 128 + 2 * i])) | odd << 16;
    *reinterpret_cast<uint4*>(shared + kRingBytes<kTile> + 16 * (thread + kThreads * i)) = {pair, pair, pair, pair};
  }
  if constexpr (kNested) nested_code[thread] = a.nested_code[thread];

  const uint32_t copy = ring + kRingBytes<kTile> + 4 * lane;
  const auto pair_at = [copy](uint32_t place) { return load_shared(copy + place); };
  // What a lane reads of a step: 8 bytes of codes of each of four rows, which a warp has beside each other, and of
  // every eighth token 16 values of x in a row, two chunks whose place depends on whether the token is odd.
  const uint32_t codes_at = ring + own_step * kCodeBytes + kStep / 2 * warp_row + 8 * lane;
  const int first_of_warp = share_steps ? 0 : group * warp_tokens;
  const uint32_t x_at = ring + x_begin + own_step * step_bytes_of_x + 128 * (first_of_warp + gemv::token_of(lane));
  const uint32_t place_of_chunk = 2 * gemv::first_k(lane) ^ (gemv::token_of(lane) & 1) << 4;
  const uint32_t low_at = x_at + place_of_chunk, high_at = x_at + (place_of_chunk ^ 16);
  float totals[2][columns][4] = {};
  int used = 0;
  for (int first = 0; first < of_part; first += ahead) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int stage = first + i;
      if (stage >= of_part) break;
      copy_wait<stages - 2>();
      __syncthreads();  // what this stage needs has come, and all have ended the stage before
      load();
      const float own = kNested ? nested_scale(nested_code[next[i].number], next[i].scale, offset) : next[i].scale;
      fetch(next[i], stage + ahead);
      if (stage * stage_steps + own_step < count) {
        uint32_t weights[2][kProducts][4];
        float scales[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 one = load_shared_8(codes_at + used + 512 * half);
          const uint2 other = load_shared_8(codes_at + used + 512 * half + 256);
          const uint32_t codes[2][2] = {{one.x, one.y}, {other.x, other.y}};
#pragma unroll
          for (int product = 0; product < kProducts; ++product) {
            gemv::weight_operand(pair_at, codes[0], codes[1], product, weights[half][product]);
          }
          scales[2 * half] = __shfl_sync(0xFFFFFFFFu, own, 16 * half + gemv::row_of(lane, 0));
          scales[2 * half + 1] = __shfl_sync(0xFFFFFFFFu, own, 16 * half + gemv::row_of(lane, 1));
        }
#pragma unroll
        for (int column = 0; column < columns; ++column) {
          const uint4 low = load_shared_16(low_at + used + 1024 * column);
          const uint4 high = load_shared_16(high_at + used + 1024 * column);
          const uint32_t values_of_x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          float sums[2][4] = {};
#pragma unroll
          for (int product = 0; product < kProducts; ++product) {
            uint32_t tokens[2];
            gemv::token_operand(values_of_x, product, tokens);
#pragma unroll
            for (int half = 0; half < 2; ++half) multiply_add<T>(sums[half], weights[half][product], tokens);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            gemv::add_scaled(totals[half][column], sums[half], scales[2 * half], scales[2 * half + 1]);
          }
        }
      }
      used = used + stage_bytes == kRingBytes<kTile> ? 0 : used + stage_bytes;
    }
  }

  // The adapter: t takes the place of x, and lora_B that of the weight, 16 ranks at a time, of which a lane has four in
  // a row of both. Groups that share the steps take turns.
  const int rank = blockIdx.z ? 0 : a.rank;
  if (rank) wait_for_previous();
  for (int base = share_steps ? 16 * group : 0; base < rank; base += 16 * stage_steps) {
    const int place = base + 4 * (lane & 3);
    uint32_t of_B[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = min(first_row + warp_row + 8 * i + (lane >> 2), last_row);
      const uint2 four = a.wide ? four_of<T>(static_cast<const float*>(a.B) + row * rank, place, rank, a.fours)
                                : four_of<T>(static_cast<const T*>(a.B) + row * rank, place, rank, a.fours);
      of_B[i / 2][i % 2] = four.x;
      of_B[i / 2][i % 2 + 2] = four.y;
    }
#pragma unroll
    for (int column = 0; column < columns; ++column) {
      const int64_t of = min(first_token + first_of_warp + gemv::kTokens * column + gemv::token_of(lane), a.rows - 1);
      const uint2 four = four_of<T>(a.t + of * rank, place, rank, a.fours);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[4] = {};
        multiply_add<T>(sums, of_B[half], {four.x, four.y});
        gemv::add_scaled(totals[half][column], sums, a.scaling, a.scaling);
      }
    }
  }

  // By way of shared memory, (tokens, kPitch), where the two groups add up, and from which many columns of a row of y
  // are written at once. The pitch leaves the lanes of a warp different banks.
  static_assert(4 * kTile * kPitch <= kRingBytes<kTile> + kTableBytes);
  float* const tile = reinterpret_cast<float*>(shared);
  const auto for_sums = [&](const auto& with) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int column = 0; column < columns; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int of = first_of_warp + gemv::kTokens * column + 2 * (lane & 3) + (i & 1);
          with(totals[half][column][i], tile[of * kPitch + warp_row + 16 * half + gemv::row_of(lane, i >> 1)]);
        }
      }
    }
  };
  __syncthreads();  // ring and table are free
  if (!share_steps || group == 1) for_sums([](float total, float& place) { place = total; });
  if constexpr (share_steps) {
    __syncthreads();
    if (group == 0) for_sums([](float total, float& place) { place = total + place; });
  }
  __syncthreads();
  const int column = thread % (kRows / 8) * 8;
  const int row = first_row + column;
  const bool whole = a.out_features % 8 == 0;
  if (row > last_row) return;
  float bias[8] = {};
  if (a.bias && blockIdx.z == 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) bias[i] = row + i <= last_row ? static_cast<float>(a.bias[row + i]) : 0.0f;
  }
  for (int of = thread / (kRows / 8); of < min(kTile, a.rows - first_token); of += kThreads / (kRows / 8)) {
    const float4 low = *reinterpret_cast<const float4*>(tile + of * kPitch + column);
    const float4 high = *reinterpret_cast<const float4*>(tile + of * kPitch + column + 4);
    const float sums[8] = {low.x + bias[0],  low.y + bias[1],  low.z + bias[2],  low.w + bias[3],
                           high.x + bias[4], high.y + bias[5], high.z + bias[6], high.w + bias[7]};
    const int64_t place = (first_token + of) * a.out_features + row;
    if (gridDim.z > 1) {
      float* const to = a.workspace + blockIdx.z * a.rows * a.out_features + place;
      if (whole) {
        *reinterpret_cast<float4*>(to) = {sums[0], sums[1], sums[2], sums[3]};
        *reinterpret_cast<float4*>(to + 4) = {sums[4], sums[5], sums[6], sums[7]};
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (row + i <= last_row) to[i] = sums[i];
        }
      }
    } else if (whole) {
      *reinterpret_cast<uint4*>(a.y + place) = {packed_pair(sums[0], sums[1], T{}), packed_pair(sums[2], sums[3], T{}),
                                                packed_pair(sums[4], sums[5], T{}), packed_pair(sums[6], sums[7], T{})};
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i <= last_row) a.y[place + i] = rounded<T>(sums[i]);
      }
    }
  }
}

constexpr const char* kName = "qlora_mma";

template <typename T, int kTile>
void launch_tile(const Arguments<T>& a, int parts, cudaStream_t stream) {
  launch_kernel(kName, a.nested_code ? qlora_mma_kernel<T, kTile, true> : qlora_mma_kernel<T, kTile, false>,
                {.grid = dim3(static_cast<unsigned>((a.out_features + kRows - 1) / kRows),
                              static_cast<unsigned>((a.rows + kTile - 1) / kTile), static_cast<unsigned>(parts)),
                 .threads = kThreads,
                 .stream = stream,
                 .dynamic_bytes = kRingBytes<kTile> + kTableBytes + size_t{a.nested_code ? 1024u : 0u},
                 .early = a.rank > 0},
                a);
}

template <typename T>
void launch(const Arguments<T>& a, const void* A, T* t, int64_t tile, int parts, cudaStream_t stream) {
  if (a.rank) lora_down(kName, a.x, A, a.wide, t, a.in_features, a.rows, a.rank, stream);
  switch (tile) {
    case 16: launch_tile<T, 16>(a, parts, stream); break;
    case 32: launch_tile<T, 32>(a, parts, stream); break;
    case 64: launch_tile<T, 64>(a, parts, stream); break;
    default: launch_tile<T, 128>(a, parts, stream);
  }
  if (parts > 1) sum_parts(kName, a.workspace, a.y, a.rows * a.out_features, parts, stream);
}

}  // namespace mma16

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace

void qlora_mma(Tensor x, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, std::optional<Tensor> bias,
               std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, double scaling, Tensor y, Tensor t,
               int64_t tile, int64_t parts, std::optional<Tensor> workspace, std::optional<Tensor> nested_absmax,
               std::optional<Tensor> nested_offset, std::optional<Tensor> nested_code, int64_t stream_handle) {
  using namespace mma16;
  const LayerFacts facts = checked_layer(kName, x, packed, absmax, code, blocksize, bias, lora_A, lora_B, y, t,
                                         nested_absmax, nested_offset, nested_code);
  STD_TORCH_CHECK(tile == 16 || tile == 32 || tile == 64 || tile == 128, "qlora_mma: tile must be 16, 32, 64 or 128");
  STD_TORCH_CHECK(facts.rows <= 65535 * tile, "qlora_mma: at most 65535 tiles of rows");
  STD_TORCH_CHECK(x.numel() <= INT32_MAX && packed.numel() <= UINT32_MAX && facts.out_features <= INT32_MAX - kRows,
                  "qlora_mma: x must have less than 2^31 values, packed less than 2^32, and y less than 2^31 - 128 "
                  "columns");
  STD_TORCH_CHECK(parts >= 1 && parts <= kMostParts, "qlora_mma: parts must be 1 to 16");
  const int64_t steps = facts.in_features / mma16::kStep, steps_of_part = (steps + parts - 1) / parts;
  STD_TORCH_CHECK((parts - 1) * steps_of_part < steps, "qlora_mma: each part needs a step of 64 values of k");
  STD_TORCH_CHECK(parts == 1 || (workspace && workspace->scalar_type() == ScalarType::Float &&
                                 workspace->is_contiguous() &&
                                 workspace->numel() == parts * facts.rows * facts.out_features &&
                                 reinterpret_cast<uintptr_t>(workspace->data_ptr()) % 16 == 0),
                  "qlora_mma: workspace must have (parts, rows, out_features) values, float32, contiguous at 16 bytes");
  const bool fours = !facts.wide && facts.rank % 4 == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 8 == 0 &&
                     reinterpret_cast<uintptr_t>(pointer<void>(lora_B)) % 8 == 0;
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const auto run = [&]<typename T>(T) {
    mma16::launch(
        mma16::Arguments<T>{static_cast<const T*>(x.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
                            absmax.data_ptr(), static_cast<const float*>(code.data_ptr()), pointer<T>(bias),
                            static_cast<const T*>(t.data_ptr()), pointer<void>(lora_B), pointer<float>(nested_absmax),
                            pointer<float>(nested_offset), pointer<float>(nested_code), static_cast<T*>(y.data_ptr()),
                            parts == 1 ? nullptr : static_cast<float*>(workspace->data_ptr()), facts.in_features,
                            facts.out_features, static_cast<int>(facts.rows), static_cast<int>(facts.rank), facts.shift,
                            static_cast<int>(steps_of_part), static_cast<float>(scaling), facts.wide, fours},
        pointer<void>(lora_A), static_cast<T*>(t.data_ptr()), tile, static_cast<int>(parts),
        reinterpret_cast<cudaStream_t>(stream_handle));
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace harlora::cuda
