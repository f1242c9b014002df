// The gradient of the layer's input from the packed weight: codes of two rows become a register of the operand of
// mma.sync by a table of byte pairs, and are at no time a 16-bit weight in memory. u = scaling·dY·lora_B is a small
// kernel of its own (lora_low.cuh), beside which this one starts; u·lora_A is further products of the same sums. Where
// there are fewer tiles of dX than multiprocessors, blocks of threads share the sum over the rows of the weight of
// each, and a last kernel adds up the parts in order.
//
// A scale multiplies the decoded weight. It could multiply dY, which takes fewer instructions with less than 64 tokens,
// and more with more; but dY would be rounded once more, and in float16 may be too small for that.

#include "qlora_dx.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <type_traits>

#include "launch.cuh"
#include "layer.h"
#include "lora_low.cuh"
#include "ptx.cuh"
#include "qlora_dx.h"
#include "qlora_dx_sm90.h"
#include "ragged.cuh"
#include "sum_parts.cuh"
#include "types.cuh"

namespace harlora::cuda {
namespace dx {
namespace {

template <typename T>
struct Arguments {
  const T* grad;
  const uint8_t* packed;
  const void* absmax;
  const float* code;
  const void* A;  // T, or float if `wide`
  const T* u;
  const float* nested_absmax;
  const float* nested_offset;
  const float* nested_code;
  T* grad_x;
  float* sums;  // (parts, rows, in_features)
  int64_t in_features;
  int64_t out_features;
  int rows;
  int rank;
  int shift;  // log2(blocksize)
  int steps;  // of a part
  bool wide;
};

// Pairs of neighbouring columns of a row of lora_A.
template <typename T, int kPairs>
__device__ __forceinline__ void read_pairs(const void* A, bool wide, int64_t place, uint32_t (&pairs)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; i += 2) {
    if (wide) {
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(A) + place + 2 * i);
      pairs[i] = packed_pair(four.x, four.y, T{});
      pairs[i + 1] = packed_pair(four.z, four.w, T{});
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(static_cast<const T*>(A) + place + 2 * i);
      pairs[i] = two.x;
      pairs[i + 1] = two.y;
    }
  }
}

template <typename T, int kTile, bool kNested>
__global__ void __launch_bounds__(kThreads, kTile <= 32 ? 2 : 1) qlora_dx_kernel(const Arguments<T> a) {
  using S = Shape<kTile>;
  constexpr int stages = S::kStages, step_rows = S::kStep, products = S::kProducts;
  alignas(16) __shared__ uint32_t table[kPairWords];
  alignas(16) __shared__ uint16_t scales[2][S::kScales];
  __shared__ float nested_code[kNested ? 256 : 1];
  uint8_t* const dynamic = dynamic_shared();
  const uint32_t grad_base = address_of_shared(dynamic), codes_base = grad_base + stages * S::kGradBytes;
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);  // so the compiler knows it is one for all lanes
  const int group = warp % S::kGroups, slice = warp / S::kGroups, g = lane >> 2, i4 = lane & 3;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int first_token = blockIdx.y * kTile, begin = blockIdx.z * a.steps;
  const int count = min(a.steps, static_cast<int>((a.out_features + step_rows - 1) / step_rows) - begin);
  let_next_start();

  // What a thread copies of each step: 16 bytes of codes and of some tokens of dY. What is past the last row, token or
  // column is zero, and its address is not read.
  const int slot = thread >> 2, chunk = thread & 3, token = thread / S::kChunks, grad_chunk = thread % S::kChunks;
  constexpr int copies = kTile * S::kChunks > kThreads ? kTile * S::kChunks / kThreads : 1;
  constexpr int apart = kThreads / S::kChunks;
  const int rows_there = static_cast<int>(a.out_features) - begin * step_rows;  // from the part's first on
  const int64_t first_row = static_cast<int64_t>(begin) * step_rows;
  const uint8_t* codes_from =
      a.packed + ((first_row + row_of_slot(slot)) * a.in_features + first_column) / 2 + 16 * chunk;
  const T* grad_from = a.grad + (first_token + token) * a.out_features + first_row + 8 * grad_chunk;
  int codes_left = first_column + 32 * chunk < a.in_features ? rows_there - row_of_slot(slot) : 0;
  int grad_left = rows_there - 8 * grad_chunk;
  const uint32_t codes_to = codes_base + place_of_codes(slot, chunk);
  const uint32_t grad_to = place_of_grad<S::kChunks>(token, grad_chunk);
  const int tokens_there = a.rows - first_token - token;
  const int64_t next_codes = step_rows / 2 * a.in_features, next_token = apart * a.out_features;
  const bool whole = a.out_features % 8 == 0;
  int filled = 0, asked = 0;
  const auto load = [&] {
    if (asked < count) {
      if (4 * step_rows >= kThreads || thread < 4 * step_rows) {
        copy_async(codes_to + filled * S::kCodesBytes, codes_from, codes_left > 0);
      }
      const uint32_t to = grad_to + filled * S::kGradBytes;
      if (kTile * S::kChunks < kThreads && token >= kTile) {
        // Fewer than one copy for each thread.
      } else if (whole) {
#pragma unroll
        for (int i = 0; i < copies; ++i) {
          copy_async(grad_base + to + 2 * step_rows * apart * i, grad_from + i * next_token,
                     apart * i < tokens_there && grad_left > 0);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < copies; ++i) {
          *reinterpret_cast<uint4*>(dynamic + to + 2 * step_rows * apart * i) =
              eight_or_zeros<false>(grad_from + i * next_token, apart * i < tokens_there ? grad_left : 0);
        }
      }
      codes_from += next_codes;
      grad_from += step_rows;
      codes_left -= step_rows;
      grad_left -= step_rows;
      filled = filled + 1 == stages ? 0 : filled + 1;
    }
    ++asked;
    copy_commit();
  };

  // The scales of a step are read by one thread for each row and 64 columns, a step before they are written.
  const int half = thread & 1, scale_row = thread >> 1;
  const bool has_scale = thread < kHalves * step_rows;
  const int64_t column = first_column + 64 * half, blocks = a.in_features >> a.shift;
  const float offset = kNested ? *a.nested_offset : 0.0f;
  int64_t block = (first_row + scale_row) * blocks + (column >> a.shift);
  int scales_left = has_scale && column < a.in_features ? rows_there - scale_row : 0;
  struct Read {
    float scale;
    int number;
  };
  const auto read_scale = [&]() -> Read {
    Read read{0.0f, -1};
    if (scales_left > 0) {
      if constexpr (kNested) {
        read = {a.nested_absmax[block >> 8], static_cast<const uint8_t*>(a.absmax)[block]};
      } else {
        read.scale = static_cast<const float*>(a.absmax)[block];
      }
    }
    block += step_rows * blocks;
    scales_left -= step_rows;
    return read;
  };
  uint16_t* const scale_to = scales[0] + place_of_scale<step_rows>(half, scale_row);
  const auto write_scale = [&](int step, const Read& read) {
    if (!has_scale) return;
    float scale = read.scale;
    if constexpr (kNested) scale = read.number < 0 ? 0.0f : nested_scale(nested_code[read.number], scale, offset);
    T high, low;
    split(scale, high, low);
    uint16_t* const to = scale_to + (step & 1) * S::kScales;
    to[0] = pattern(high);
    to[4] = pattern(low);
  };

#pragma unroll
  for (int i = 0; i < stages - 1; ++i) load();
  const Read first_scale = read_scale(), second_scale = read_scale();
  Read next_scale = read_scale();
  if constexpr (kNested) nested_code[thread] = a.nested_code[thread];
  // A thread writes all copies of the pair of one byte, neighbours beginning at different ones, in different banks.
  static_assert(kThreads == kPairs);
  const uint32_t pair = pattern(rounded<T>(a.code[thread >> 4])) |
                        static_cast<uint32_t>(pattern(rounded<T>(a.code[thread & 15]))) << 16;
#pragma unroll
  for (int i = 0; i < kPairCopies / 4; ++i) {
    const int place = kPairCopies * thread + 4 * ((i + thread) % (kPairCopies / 4));
    *reinterpret_cast<uint4*>(table + place) = {pair, pair, pair, pair};
  }
  if constexpr (kNested) __syncthreads();
  write_scale(0, first_scale);
  write_scale(1, second_scale);

  const uint32_t copy = address_of_shared(table) + 4 * lane;
  const auto pair_at = [copy](uint32_t word, int byte) { return load_shared(copy + pair_place(word, byte)); };
  const uint32_t codes_at = codes_base + place_of_lane_codes<kTile>(group, slice, lane);
  const uint32_t grad_at = grad_base + place_of_lane_grad<kTile>(slice, lane);
  const uint32_t scales_at =
      address_of_shared(scales) + 2 * place_of_scale<step_rows>(group * S::kGroupColumns / 64, 16 * slice + 4 * i4);
  const auto decode = [&](int stage, int step, uint32_t (&weights)[products][4]) {
    const uint32_t from = codes_at + stage * S::kCodesBytes;
    const uint4 scale = load_shared_16(scales_at + (step & 1) * 2 * S::kScales);
    uint32_t even[2], odd[2];
    if constexpr (products == 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t one = load_shared_4(from + 2 * i * kNextRow);
        const uint32_t other = load_shared_4(from + (2 * i + 1) * kNextRow);
        even[i] = even_columns(one, other);
        odd[i] = odd_columns(one, other);
      }
    } else {
      uint32_t halves[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) halves[i] = load_shared_2(from + i * kNextRow);
      const uint32_t one = firsts(halves[0], halves[2]), other = firsts(halves[1], halves[3]);
      even[0] = even_columns(one, other);
      odd[0] = odd_columns(one, other);
    }
#pragma unroll
    for (int i = 0; i < products; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int word = products == 4 ? j >> 1 : 0, byte = products == 4 ? i : 2 * (j >> 1) + i;
        const uint32_t pair = pair_at(j & 1 ? odd[word] : even[word], byte);
        weights[i][j] = j < 2 ? scaled_pair(pair, scale.x, scale.z, T{}) : scaled_pair(pair, scale.y, scale.w, T{});
      }
    }
  };

  float sums[products][kTile / 8][4] = {};
  // The operand of a step is decoded while the products of the one before are computed; that of the step after the last
  // is made of what happens to be there, and not used.
  uint32_t weights[products][4];
  copy_wait<stages - 2>();
  __syncthreads();
  decode(0, 0, weights);
  int stage = 0;
  for (int step = 0; step < count; ++step) {
    copy_wait<stages - 3>();
    __syncthreads();  // the next step has come, and all warps have ended the one before
    load();
    write_scale(step + 2, next_scale);
    next_scale = read_scale();
    const int next_stage = stage + 1 == stages ? 0 : stage + 1;
    uint32_t next[products][4];
    decode(next_stage, step + 1, next);
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      const uint2 four = load_shared_8(grad_at + stage * S::kGradBytes + 128 * S::kChunks * i);
#pragma unroll
      for (int j = 0; j < products; ++j) multiply_add<T>(sums[j][i], weights[j], {four.x, four.y});
    }
#pragma unroll
    for (int i = 0; i < products; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][j] = next[i][j];
    }
    stage = next_stage;
  }

  // The adapter: u takes the place of dY, and lora_A that of the weight.
  const int64_t lane_column = first_column + group * S::kGroupColumns + first_column_of_lane<kTile>(lane);
  const int rank = blockIdx.z ? 0 : a.rank, padded = static_cast<int>(padded_rank(rank));
  if (rank) wait_for_previous();
  for (int first = 16 * slice; first < padded; first += 16 * S::kSlices) {
    uint32_t pairs[4][products] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int of = first + 4 * i4 + i;
      if (of < rank && lane_column < a.in_features) {
        read_pairs<T>(a.A, a.wide, of * a.in_features + lane_column, pairs[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < products; ++i) {
      weights[i][0] = firsts(pairs[0][i], pairs[1][i]);
      weights[i][1] = seconds(pairs[0][i], pairs[1][i]);
      weights[i][2] = firsts(pairs[2][i], pairs[3][i]);
      weights[i][3] = seconds(pairs[2][i], pairs[3][i]);
    }
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
      const int64_t of = first_token + 8 * i + g;
      uint2 four{0, 0};
      if (of < a.rows) four = *reinterpret_cast<const uint2*>(a.u + of * padded + first + 4 * i4);
#pragma unroll
      for (int j = 0; j < products; ++j) multiply_add<T>(sums[j][i], weights[j], {four.x, four.y});
    }
  }

  // The sums of the slices, by way of shared memory, some tokens at a time.
  constexpr int pitch = kColumns + 4, together = 64 / S::kSlices;
  static_assert(4 * S::kSlices * together * pitch <= stages * (S::kGradBytes + S::kCodesBytes));
  float* const tile = reinterpret_cast<float*>(dynamic);
  const int of_lane = group * S::kGroupColumns + first_column_of_lane<kTile>(lane);
#pragma unroll
  for (int begin_token = 0; begin_token < kTile; begin_token += together) {
    __syncthreads();  // the stages, or the sums before, have been read
#pragma unroll
    for (int i = 0; i < together / 4; ++i) {
      const int of = 8 * (i >> 1) + 2 * i4 + (i & 1);
      float* const to = tile + (slice * together + of) * pitch + of_lane;
#pragma unroll
      for (int j = 0; j < products; j += 2) {
        const float(&one)[4] = sums[j][begin_token / 8 + (i >> 1)];
        const float(&other)[4] = sums[j + 1][begin_token / 8 + (i >> 1)];
        *reinterpret_cast<float4*>(to + 2 * j) = {one[i & 1], one[2 + (i & 1)], other[i & 1], other[2 + (i & 1)]};
      }
    }
    __syncthreads();
    for (int i = thread; i < together * (kColumns / 8); i += kThreads) {
      const int of = i / (kColumns / 8), to = i % (kColumns / 8) * 8;
      const int64_t of_row = first_token + begin_token + of;
      if (of_row >= a.rows || first_column + to >= a.in_features) continue;
      float total[8] = {};
#pragma unroll
      for (int j = 0; j < S::kSlices; ++j) {
        const float4* const more = reinterpret_cast<const float4*>(tile + (j * together + of) * pitch + to);
        const float4 low = more[0], high = more[1];
        const float each[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) total[k] += each[k];
      }
      if (gridDim.z == 1) {
        *reinterpret_cast<uint4*>(a.grad_x + of_row * a.in_features + first_column + to) = {
            packed_pair(total[0], total[1], T{}), packed_pair(total[2], total[3], T{}),
            packed_pair(total[4], total[5], T{}), packed_pair(total[6], total[7], T{})};
      } else {
        float4* const part = reinterpret_cast<float4*>(
            a.sums + (blockIdx.z * static_cast<int64_t>(a.rows) + of_row) * a.in_features + first_column + to);
        part[0] = {total[0], total[1], total[2], total[3]};
        part[1] = {total[4], total[5], total[6], total[7]};
      }
    }
  }
}

constexpr const char* kName = "qlora_dx";

template <typename T, int kTile>
void launch_tile(Arguments<T> a, int parts, cudaStream_t stream) {
  using S = Shape<kTile>;
  const int64_t steps = (a.out_features + S::kStep - 1) / S::kStep;
  a.steps = static_cast<int>((steps + parts - 1) / parts);
  STD_TORCH_CHECK((parts - int64_t{1}) * a.steps < steps, kName, ": each part needs a step of ", S::kStep, " rows");
  launch_kernel(kName, a.nested_code ? qlora_dx_kernel<T, kTile, true> : qlora_dx_kernel<T, kTile, false>,
                {.grid = dim3(static_cast<unsigned>((a.in_features + kColumns - 1) / kColumns),
                              static_cast<unsigned>((a.rows + kTile - 1) / kTile), static_cast<unsigned>(parts)),
                 .threads = kThreads,
                 .stream = stream,
                 .dynamic_bytes = S::kStages * (S::kGradBytes + S::kCodesBytes),
                 .early = a.rank > 0},
                a);
  if (parts > 1) sum_parts(kName, a.sums, a.grad_x, a.rows * a.in_features, parts, stream);
}

template <typename T>
void launch(const Arguments<T>& a, const void* B, T* u, float scaling, int64_t tile, int parts, cudaStream_t stream) {
  if (a.rank) lora_low(kName, a.grad, B, a.wide, u, static_cast<int>(a.out_features), a.rows, a.rank, scaling, stream);
  if (!a.grad_x) return;
  if (tile == 256) {
    return qlora_dx_sm90({a.grad, a.packed, a.absmax, a.code, a.A, a.u, a.nested_absmax, a.nested_offset, a.nested_code,
                          a.grad_x, a.in_features, a.out_features, a.rows, a.rank, a.shift, a.wide,
                          std::is_same_v<T, __nv_bfloat16>},
                         parts, stream);
  }
  switch (tile) {
    case 16: return launch_tile<T, 16>(a, parts, stream);
    case 32: return launch_tile<T, 32>(a, parts, stream);
    case 64: return launch_tile<T, 64>(a, parts, stream);
    default: return launch_tile<T, 128>(a, parts, stream);
  }
}

}  // namespace
}  // namespace dx

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace

void qlora_dx(Tensor grad, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, std::optional<Tensor> lora_A,
              std::optional<Tensor> lora_B, double scaling, std::optional<Tensor> grad_x, std::optional<Tensor> u,
              std::optional<Tensor> sums, int64_t tile, int64_t parts, std::optional<Tensor> nested_absmax,
              std::optional<Tensor> nested_offset, std::optional<Tensor> nested_code, int64_t stream_handle) {
  constexpr const char* name = dx::kName;
  const auto type = grad.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": grad must be bfloat16 or float16");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.numel() > 0 && grad.is_contiguous() && is_aligned(grad), name,
                  ": grad must be a matrix that is not empty, contiguous at 16 bytes");
  const int64_t rows = grad.size(0), out_features = grad.size(1), in_features = 2 * packed.numel() / out_features;
  const int shift = checked_weight(name, in_features, out_features, packed, absmax, code, blocksize, nested_absmax,
                                   nested_offset, nested_code);
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value() && lora_A.has_value() == u.has_value(), name,
                  ": lora_A, lora_B and u must be given together");
  const int64_t rank = lora_A ? lora_A->size(0) : 0;
  const bool wide = lora_A && lora_A->scalar_type() == ScalarType::Float;
  const auto of_adapter = wide ? ScalarType::Float : type;
  STD_TORCH_CHECK(!lora_A || (is_flat(*lora_A, of_adapter, rank * in_features) && is_aligned(*lora_A) &&
                              is_flat(*lora_B, of_adapter, out_features * rank) && is_aligned(*lora_B) &&
                              is_flat(*u, type, rows * padded_rank(rank)) && is_aligned(*u)),
                  name, ": lora_A, lora_B and u must be contiguous at 16 bytes and fit grad and the weight; u in the "
                  "dtype of grad, lora_A and lora_B both in it or in float32");
  STD_TORCH_CHECK(!grad_x || (is_flat(*grad_x, type, rows * in_features) && is_aligned(*grad_x)), name,
                  ": grad_x must be contiguous at 16 bytes, (rows, in_features) in the dtype of grad");
  const bool many = tile == 256;
  STD_TORCH_CHECK(tile == 16 || tile == 32 || tile == 64 || tile == 128 || many, name,
                  ": tile must be 16, 32, 64, 128 or 256");
  STD_TORCH_CHECK(!many || (out_features % 8 == 0 && parts <= 8), name,
                  ": a tile of 256 takes out_features that are a multiple of 8, and at most 8 parts");
  STD_TORCH_CHECK(out_features < int64_t{1} << 30, name, ": at most 2^30 out_features");
  STD_TORCH_CHECK(rows <= 65535 * tile && rank <= 65535 * kLowRanks, name, ": at most 65535 tiles of rows or rank");
  STD_TORCH_CHECK(parts >= 1 && parts <= 32, name, ": parts must be 1 to 32");
  STD_TORCH_CHECK(!grad_x || parts == 1 || many ||
                      (sums && is_flat(*sums, ScalarType::Float, parts * rows * in_features) && is_aligned(*sums)),
                  name, ": more parts than one need sums, (parts, rows, in_features), float32, contiguous at 16 bytes");
  torch::stable::accelerator::DeviceGuard guard(grad.get_device());
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const auto run = [&]<typename T>(T) {
    T* const of_u = u ? static_cast<T*>(u->data_ptr()) : nullptr;
    dx::launch(dx::Arguments<T>{static_cast<const T*>(grad.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
                                absmax.data_ptr(), static_cast<const float*>(code.data_ptr()), pointer<void>(lora_A),
                                of_u, pointer<float>(nested_absmax), pointer<float>(nested_offset),
                                pointer<float>(nested_code), grad_x ? static_cast<T*>(grad_x->data_ptr()) : nullptr,
                                sums ? static_cast<float*>(sums->data_ptr()) : nullptr, in_features, out_features,
                                static_cast<int>(rows), static_cast<int>(rank), shift, 0, wide},
               pointer<void>(lora_B), of_u, static_cast<float>(scaling), tile, static_cast<int>(parts), stream);
  };
  if (type == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace harlora::cuda
