// The layer for at most 8 rows of x, written to take as long as reading the packed weight: t = x·lora_Aᵀ is a small
// kernel of its own that runs beside the large one, which asks for t when it has read its part of the weight.

#include "qlora_gemv.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "launch.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "ptx.cuh"
#include "qlora_gemv.h"
#include "types.cuh"

namespace harlora::cuda {
namespace {

using gemv::kRows;
using gemv::kStep;
using gemv::kThreads;
using gemv::kTokens;
using gemv::kWarps;

constexpr int kAhead = 4;  // steps of a warp whose codes are on their way at a time

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

// What a warp has read of one step: the codes of two rows and their scales, of nested ones what they are made of.
struct Read {
  uint2 codes[2];
  float scales[2];
  int numbers[2];
};

template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads, 2) qlora_gemv_kernel(const Arguments<T> a) {
  __shared__ uint32_t table[kPairWords];
  __shared__ float parts[kWarps][kTokens * kRows];
  __shared__ float nested_code[kNested ? 256 : 1];
  __shared__ uint16_t values[16];
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);  // so the compiler knows it is one for all lanes
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int steps = static_cast<int>(a.in_features / kStep), shift = a.shift - 6;  // log2 of the steps of a block
  // Rows of the weight and of x past the last one are read as if they were that, and their results not written.
  const uint8_t* codes[2];  // of the next step that is read
  int64_t first_block[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(first_row + gemv::row_of(lane, i), a.out_features - 1);
    codes[i] = a.packed + (row * a.in_features + gemv::first_k(lane) + warp * kStep) / 2;
    first_block[i] = row * (a.in_features >> a.shift);
    asm volatile("" : "+l"(first_block[i]));  // or the compiler computes it anew in each step
  }
  int ahead = warp;
  const float offset = kNested ? *a.nested_offset : 0.0f;
  const auto read = [&](Read& into) {
    if (ahead < steps) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        into.codes[i] = load_once(codes[i]);
        codes[i] += kWarps * kStep / 2;
        const int64_t block = first_block[i] + (ahead >> shift);
        if constexpr (kNested) {
          into.numbers[i] = static_cast<const uint8_t*>(a.absmax)[block];
          into.scales[i] = a.nested_absmax[block >> 8];
        } else {
          into.scales[i] = static_cast<const float*>(a.absmax)[block];
        }
      }
    }
    ahead += kWarps;
  };

  if (threadIdx.x < 16) values[threadIdx.x] = pattern(rounded<T>(a.code[threadIdx.x]));
  if constexpr (kNested) nested_code[threadIdx.x] = a.nested_code[threadIdx.x];
  __syncthreads();
  Read next[kAhead] = {};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read(next[i]);
  // The table is written while the first codes are on their way.
  for (int i = threadIdx.x; i < kPairWords; i += kThreads) table[i] = pair_of(values, i / kPairCopies);
  __syncthreads();

  const int token = min(gemv::token_of(lane), a.tokens - 1);
  const uint4* x = reinterpret_cast<const uint4*>(a.x + token * a.in_features + gemv::first_k(lane));
  const uint32_t copy = address_of_shared(table) + 4 * lane;
  const auto pair_at = [copy](uint32_t place) { return load_shared(copy + place); };
  uint4 next_low, next_high;  // x of the next step, which takes as long to come as this step does
  const auto read_x = [&](int step) {
    const int place = min(step, steps - 1) * (kStep / 8);
    next_low = x[place];
    next_high = x[place + 1];
    asm volatile("" ::: "memory");  // not that of all steps at once, which would take too many registers
  };
  read_x(warp);
  float total[4] = {};
  for (int begin = warp; begin < steps; begin += kWarps * kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int step = begin + kWarps * i;
      const Read now = next[i];
      const uint4 low = next_low, high = next_high;
      read(next[i]);
      read_x(step + kWarps);
      const uint32_t values_of_x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const uint32_t first[2] = {now.codes[0].x, now.codes[0].y};
      const uint32_t second[2] = {now.codes[1].x, now.codes[1].y};
      float sums[4] = {};
#pragma unroll
      for (int product = 0; product < gemv::kProducts; ++product) {
        uint32_t weights[4], tokens[2];
        gemv::weight_operand(pair_at, first, second, product, weights);
        gemv::token_operand(values_of_x, product, tokens);
        multiply_add<T>(sums, weights, tokens);
      }
      const auto scale = [&](int which) {
        return kNested ? nested_scale(nested_code[now.numbers[which]], now.scales[which], offset) : now.scales[which];
      };
      if (step < steps) gemv::add_scaled(total, sums, scale(0), scale(1));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][gemv::place_of_sum(lane, i)] = total[i];
  __syncthreads();
  if (a.rank) wait_for_previous();
  const int64_t row = first_row + threadIdx.x % kRows;
  const int of_token = threadIdx.x / kRows;
  if (of_token >= a.tokens || row >= a.out_features) return;
  float sum = 0, adapter = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += parts[i][threadIdx.x];
  for (int i = 0; i < a.rank; ++i) {
    const int64_t place = row * a.rank + i;
    const T B = a.wide ? rounded<T>(static_cast<const float*>(a.B)[place]) : static_cast<const T*>(a.B)[place];
    adapter += static_cast<float>(a.t[of_token * a.rank + i]) * static_cast<float>(B);
  }
  if (a.bias) sum += static_cast<float>(a.bias[row]);
  a.y[of_token * a.out_features + row] = rounded<T>(sum + a.scaling * adapter);
}

template <typename T>
void launch(const Arguments<T>& a, bool nested, cudaStream_t stream) {
  constexpr const char* name = "qlora_gemv";
  if (a.rank) lora_down(name, a.x, a.A, a.wide, a.t, a.in_features, a.tokens, a.rank, stream);
  launch_kernel(name, nested ? qlora_gemv_kernel<T, true> : qlora_gemv_kernel<T, false>,
                {.grid = dim3(static_cast<unsigned>((a.out_features + kRows - 1) / kRows)),
                 .threads = kThreads,
                 .stream = stream,
                 .early = a.rank > 0},
                a);
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
