// The layer for many rows of x on Hopper: packed codes become the first operand of wgmma in registers, and are at no
// time a 16-bit weight in memory. t = x·lora_Aᵀ is a small kernel of its own (lora_down.cuh), beside which this one
// starts; scaling·t·lora_Bᵀ is one more step of the same sums. Where there are fewer tiles of y than multiprocessors, a
// cluster of blocks shares the sum over k of each, and adds up its parts from each other's shared memory.

#include "qlora_gemm_sm90.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "launch.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "ptx.cuh"
#include "qlora_gemm_sm90.h"
#include "types.cuh"
#include "wgmma.cuh"

namespace harlora::cuda {
namespace {

using namespace gemm90;

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
  int64_t in_features;
  int64_t out_features;
  int rows;
  int rank;
  int shift;  // log2(blocksize)
  int steps;  // of a part
  float scaling;
  bool wide;
};

template <int kTile>
constexpr int kStages = kTile == 256 ? 5 : 6;
template <int kTile>
constexpr int kTileBytes = 128 * kTile;
template <int kTile>
constexpr int kDynamicBytes = kStages<kTile> * (kTileBytes<kTile> + kWeightBytes) + 1024;  // to begin at a 1024

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // what is unused elsewhere would be warned of
// Two weights times their scale, rounded once.
template <typename T>
struct Scale;

template <>
struct Scale<__nv_bfloat16> {  // float32's range, so the scale may be two numbers
  __nv_bfloat162 high, low;
  __device__ __forceinline__ explicit Scale(float scale) {
    const __nv_bfloat16 most = __float2bfloat16_rn(scale);
    const float rest = scale - __bfloat162float(most);
    high = __bfloat162bfloat162(most);
    low = __float2bfloat162_rn(rest == rest ? rest : 0.0f);  // not so if the scale is infinite
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t pair) const {
    const __nv_bfloat162 code = reinterpret_cast<const __nv_bfloat162&>(pair);
    const __nv_bfloat162 weight = __hfma2(code, high, __hmul2(code, low));
    return reinterpret_cast<const uint32_t&>(weight);
  }
};

template <>
struct Scale<__half> {
  float scale;
  __device__ __forceinline__ explicit Scale(float given) : scale(given) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t pair) const {
    const float2 code = unpacked(pair, __half{});
    return packed_pair(code.x * scale, code.y * scale, __half{});
  }
};
#endif

template <typename T, int kTile, bool kNested>
__global__ void __launch_bounds__(kThreads, 1) qlora_gemm_sm90_kernel(const Arguments<T> a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int stages = kStages<kTile>, tile_bytes = kTileBytes<kTile>;
  extern __shared__ uint8_t dynamic[];
  __shared__ uint32_t table[kPairWords];
  __shared__ float scales[2][kRows];
  __shared__ uint16_t values[16];
  __shared__ float nested_code[kNested ? 256 : 1];
  const int thread = threadIdx.x;
  const uint32_t begin_of_shared = address_of_shared(dynamic);
  const uint32_t x_base = (begin_of_shared + 1023) & ~1023u, codes_base = x_base + stages * tile_bytes;
  uint8_t* const aligned = dynamic + (x_base - begin_of_shared);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first_token = blockIdx.y * kTile, begin = blockIdx.z * a.steps;
  const int count = min(a.steps, static_cast<int>(a.in_features / kStep) - begin);

  // What a thread copies of each step: 16 bytes of codes and of every 32nd token of x. Rows past the last are read as
  // if they were that, tokens are zeros.
  const int token = thread >> 3;
  const uint8_t* codes_from = a.packed + 16 * (thread & 1) +
                              (min(first_row + (thread >> 1), a.out_features - 1) * a.in_features + begin * kStep) / 2;
  const T* x_from = a.x + (first_token + token) * a.in_features + begin * kStep + 8 * (thread & 7);
  const uint32_t codes_to = codes_base + place_of_codes(thread >> 1, thread & 1);
  const uint32_t x_to = x_base + place_of_x(token, thread & 7);
  const int64_t apart = 32 * a.in_features;
  const int tokens_there = a.rows - first_token - token;
  int filled = 0, asked = 0;
  const auto load = [&] {
    if (asked < count) {
      copy_async(codes_to + filled * kWeightBytes, codes_from, true);
#pragma unroll
      for (int i = 0; i < kTile / 32; ++i) {
        const bool there = 32 * i < tokens_there;
        copy_async(x_to + filled * tile_bytes + 4096 * i, there ? x_from + i * apart : a.x, there);
      }
      codes_from += kStep / 2;
      x_from += kStep;
      filled = filled + 1 == stages ? 0 : filled + 1;
    }
    ++asked;
    copy_commit();
  };

  // The scales of a step are read by one thread for each row, a step before they are written to shared memory.
  const int64_t first_block = (min(first_row + thread, a.out_features - 1) * a.in_features) >> a.shift;
  const float offset = kNested ? *a.nested_offset : 0.0f;
  float fetched = 0.0f;
  int number = 0;
  const auto fetch = [&](int step) {
    if (thread >= kRows || step >= count) return;
    const int64_t block = first_block + ((begin + step) >> (a.shift - 6));  // a step is 2^6 values
    if constexpr (kNested) {
      number = static_cast<const uint8_t*>(a.absmax)[block];
      fetched = a.nested_absmax[block >> 8];
    } else {
      fetched = static_cast<const float*>(a.absmax)[block];
    }
  };
  const auto write_scale = [&](int step) {
    if (thread >= kRows) return;
    scales[step & 1][thread] = kNested ? nested_scale(nested_code[number], fetched, offset) : fetched;
  };

#pragma unroll
  for (int i = 0; i < stages - 2; ++i) load();
  fetch(0);
  if (thread < 16) values[thread] = pattern(rounded<T>(a.code[thread]));
  if constexpr (kNested) nested_code[thread] = a.nested_code[thread];
  __syncthreads();
  for (int i = thread; i < kPairWords; i += kThreads) table[i] = pair_of(values, i / kPairCopies);
  write_scale(0);
  fetch(1);

  const int rows[2] = {row_of(thread, 0), row_of(thread, 1)};
  const uint32_t copy = address_of_shared(table) + 4 * (thread & 31);
  const uint32_t byte = 0x4440 + byte_of(thread);
  const auto pair_at = [&](uint32_t word) {
    return load_shared(copy + __byte_perm(word, 0, byte) * static_cast<uint32_t>(4 * kPairCopies));
  };
  float sums[kTile / 2] = {};
  const uint64_t operand = wgmma_operand(x_base);
  int stage = 0;
  // Products follow each other without a pause: the operand of the next is decoded while they are computed, each into
  // registers that the product before the last three has read.
  uint32_t weights[kProducts][1][4];
  for (int step = 0; step < count; ++step) {
    copy_wait<stages - 3>();
    show_to_async_units();
    __syncthreads();  // what this step needs has come, and both warpgroups have ended the step before the last
    const Scale<T> scaled[2] = {Scale<T>(scales[step & 1][rows[0]]), Scale<T>(scales[step & 1][rows[1]])};
    uint32_t words[2][8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 four = load_shared_16(codes_base + stage * kWeightBytes + place_of_codes(rows[i >> 1], i & 1));
      uint32_t* const to = words[i >> 1] + 4 * (i & 1);
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
    uint32_t pairs[kProducts][4];
    const auto look_up = [&](int product) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[product][i] = pair_at(words[i & 1][word_of(product, i >> 1)]);
    };
    look_up(0);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      if (product + 1 < kProducts) look_up(product + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[product][0][i] = scaled[i & 1](pairs[product][i]);
      wgmma_operand_is_there(weights[product]);
      wgmma_begin();
      Wgmma<T, kTile>::run(sums, weights[product][0], operand + ((stage * tile_bytes) >> 4) + 2 * product);
      wgmma_commit();
      // What later steps need is asked for when this one's first products are on their way.
      if (product == 0) load();
      if (product == 1) {
        write_scale(step + 1);
        fetch(step + 2);
      }
      wgmma_wait<kProducts - 1>();
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  wgmma_wait<0>();
  __syncthreads();  // the stages are free

  // The adapter: t takes the place of x, and scaling·lora_B that of the weight.
  const int rank = blockIdx.z ? 0 : a.rank;
  if (rank) wait_for_previous();
  for (int first = 0; first < rank; first += kStep) {
    const int columns = min(kStep, rank - first), products = (columns + 15) / 16;
    for (int i = thread; i < kTile * 2 * products; i += kThreads) {
      const int of = i / (2 * products), chunk = i % (2 * products);
      alignas(16) T eight[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = 8 * chunk + j;
        const bool there = first_token + of < a.rows && column < columns;
        eight[j] = there ? a.t[static_cast<int64_t>(first_token + of) * a.rank + first + column] : rounded<T>(0.0f);
      }
      *reinterpret_cast<uint4*>(aligned + place_of_x(of, chunk)) = *reinterpret_cast<const uint4*>(eight);
    }
    show_to_async_units();
    __syncthreads();
    const auto B_at = [&](int which, int column) {
      const int64_t row = first_row + rows[which];
      if (row >= a.out_features || column >= columns) return 0.0f;
      const int64_t place = row * a.rank + first + column;
      const T value = a.wide ? rounded<T>(static_cast<const float*>(a.B)[place]) : static_cast<const T*>(a.B)[place];
      return a.scaling * static_cast<float>(value);
    };
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      if (product >= products) break;
      uint32_t of_B[1][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 16 * product + 8 * (i >> 1) + 2 * (thread & 3);
        of_B[0][i] = packed_pair(B_at(i & 1, column), B_at(i & 1, column + 1), T{});
      }
      wgmma_operand_is_there(of_B);
      wgmma_begin();
      Wgmma<T, kTile>::run(sums, of_B[0], operand + 2 * product);
      wgmma_commit();
      wgmma_wait<0>();
    }
    __syncthreads();
  }

  float bias[2] = {};
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int64_t row = first_row + rows[which];
    if (a.bias && blockIdx.z == 0 && row < a.out_features) bias[which] = static_cast<float>(a.bias[row]);
  }
  // By way of shared memory, so that 16 bytes of a row of y are written at once.
  if (gridDim.z == 1) {
    constexpr int pitch = kRows + 8;
    T* const tile = reinterpret_cast<T*>(aligned);
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) {
      const int which = i >> 1 & 1;
      tile[token_of_sum(thread, i) * pitch + rows[which]] = rounded<T>(sums[i] + bias[which]);
    }
    __syncthreads();
    for (int i = thread; i < kTile * (kRows / 8); i += kThreads) {
      const int of = i / (kRows / 8), column = i % (kRows / 8) * 8;
      if (first_token + of < a.rows && first_row + column < a.out_features) {
        *reinterpret_cast<uint4*>(a.y + (first_token + of) * a.out_features + first_row + column) =
            *reinterpret_cast<const uint4*>(tile + of * pitch + column);
      }
    }
    return;
  }
  constexpr int pitch = kRows + 4;
  static_assert(4 * kTile * pitch <= stages * (tile_bytes + kWeightBytes));
  float* const tile = reinterpret_cast<float*>(aligned);
#pragma unroll
  for (int i = 0; i < kTile / 2; ++i) {
    const int which = i >> 1 & 1;
    tile[token_of_sum(thread, i) * pitch + rows[which]] = sums[i] + bias[which];
  }
  cluster_barrier();
  for (int i = blockIdx.z * kThreads + thread; i < kTile * (kRows / 8); i += gridDim.z * kThreads) {
    const int of = i / (kRows / 8), column = i % (kRows / 8) * 8;
    if (first_token + of >= a.rows || first_row + column >= a.out_features) continue;
    float total[8] = {};
    for (unsigned part = 0; part < gridDim.z; ++part) {
      const uint32_t from = shared_of(part, x_base + 4 * (of * pitch + column));
      const float4 low = load_cluster(from), high = load_cluster(from + 16);
      const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] += more[j];
    }
    *reinterpret_cast<uint4*>(a.y + (first_token + of) * a.out_features + first_row + column) = {
        packed_pair(total[0], total[1], T{}), packed_pair(total[2], total[3], T{}),
        packed_pair(total[4], total[5], T{}), packed_pair(total[6], total[7], T{})};
  }
  cluster_barrier();  // others may still read what this block has
#endif
}

constexpr const char* kName = "qlora_gemm";

template <typename T, int kTile>
void launch_tile(const Arguments<T>& a, int parts, cudaStream_t stream) {
  launch_kernel(kName, a.nested_code ? qlora_gemm_sm90_kernel<T, kTile, true> : qlora_gemm_sm90_kernel<T, kTile, false>,
                {.grid = dim3(static_cast<unsigned>((a.out_features + kRows - 1) / kRows),
                              static_cast<unsigned>((a.rows + kTile - 1) / kTile), static_cast<unsigned>(parts)),
                 .threads = kThreads,
                 .stream = stream,
                 .dynamic_bytes = kDynamicBytes<kTile>,
                 .cluster = true,
                 .early = a.rank > 0},
                a);
}

template <typename T>
void launch(const Arguments<T>& a, const void* A, T* t, int64_t tile, int parts, cudaStream_t stream) {
  if (a.rank) lora_down(kName, a.x, A, a.wide, t, a.in_features, a.rows, a.rank, stream);
  switch (tile) {
    case 64: return launch_tile<T, 64>(a, parts, stream);
    case 128: return launch_tile<T, 128>(a, parts, stream);
    default: return launch_tile<T, 256>(a, parts, stream);
  }
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace

void qlora_gemm(Tensor x, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, std::optional<Tensor> bias,
                std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, double scaling, Tensor y, Tensor t,
                int64_t tile, int64_t parts, std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_offset,
                std::optional<Tensor> nested_code, int64_t stream_handle) {
  const LayerFacts facts = checked_layer("qlora_gemm", x, packed, absmax, code, blocksize, bias, lora_A, lora_B, y, t,
                                         nested_absmax, nested_offset, nested_code);
  STD_TORCH_CHECK(facts.out_features % 8 == 0, "qlora_gemm: out_features must be a multiple of 8");
  STD_TORCH_CHECK(tile == 64 || tile == 128 || tile == 256, "qlora_gemm: tile must be 64, 128 or 256");
  STD_TORCH_CHECK(facts.rows <= 65535 * tile, "qlora_gemm: at most 65535 tiles of rows");
  STD_TORCH_CHECK(parts >= 1 && parts <= 8, "qlora_gemm: parts must be 1 to 8");
  const int64_t steps = facts.in_features / kStep, steps_of_part = (steps + parts - 1) / parts;
  STD_TORCH_CHECK((parts - 1) * steps_of_part < steps, "qlora_gemm: each part needs a step of 64 values of k");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const auto run = [&]<typename T>(T) {
    launch(Arguments<T>{static_cast<const T*>(x.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
                        absmax.data_ptr(), static_cast<const float*>(code.data_ptr()), pointer<T>(bias),
                        static_cast<const T*>(t.data_ptr()), pointer<void>(lora_B), pointer<float>(nested_absmax),
                        pointer<float>(nested_offset), pointer<float>(nested_code), static_cast<T*>(y.data_ptr()),
                        facts.in_features, facts.out_features, static_cast<int>(facts.rows),
                        static_cast<int>(facts.rank), facts.shift, static_cast<int>(steps_of_part),
                        static_cast<float>(scaling), facts.wide},
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
