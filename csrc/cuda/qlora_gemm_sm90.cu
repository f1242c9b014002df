// The layer for many rows of x on Hopper: packed codes become the first operand of wgmma in registers, and are at no
// time a 16-bit weight in memory. t = x·lora_Aᵀ is a small kernel of its own (lora_down.cuh), beside which this one
// starts; scaling·t·lora_Bᵀ is one more step of the same sums. Where there are fewer tiles of y than multiprocessors, a
// cluster of blocks shares the sum over k of each, and adds up its parts from each other's shared memory. The loop is
// that of gemm_sm90.cuh.

#include "qlora_gemm_sm90.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "gemm_sm90.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "qlora_gemm_sm90.h"

namespace harlora::cuda {
namespace {

using namespace gemm90;

template <typename T>
struct Arguments {
  CUtensorMap x;       // (rows, in_features)
  CUtensorMap packed;  // (out_features, in_features / 2) bytes
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
  int shift;   // log2(blocksize)
  int steps;   // of a part
  int shared;  // blocks of a cluster, next to each other along out_features, that share each tile of x
  float scaling;
  bool wide;
};

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
__global__ void __launch_bounds__(kAllThreads, 1) qlora_gemm_sm90_kernel(const __grid_constant__ Arguments<T> a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t dynamic[];
  __shared__ alignas(16) uint32_t table[kPairWords];
  __shared__ uint64_t barriers[2 * kStages<kTile>];
  __shared__ uint16_t values[16];
  __shared__ float nested_code[kNested ? 256 : 1];
  const int thread = threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first_token = blockIdx.y * kTile, begin = blockIdx.z * a.steps;
  const int count = min(a.steps, static_cast<int>(a.in_features / kStep) - begin);
  if (thread < 16) values[thread] = pattern(rounded<T>(a.code[thread]));
  if (kNested && thread < 256) nested_code[thread] = a.nested_code[thread];
  const Stages<kTile> stages(dynamic, barriers, a.shared, 1);

  if (thread >= kThreads) {
    give_registers<kFewRegisters>();
    if (thread == kThreads) {
      stages.copy(a.x, begin, count, first_token, [&](int step, uint32_t to, uint32_t barrier) {
        copy_tile(to, a.packed, step * (kStep / 2), static_cast<int>(first_row), barrier);
      });
    }
    __syncwarp();
    stages.do_not_write();
  } else {
    take_registers<kManyRegisters>();
    const int rows[2] = {row_of(thread, 0), row_of(thread, 1)};
    // The scales of the next step, of the two rows, are on their way during this one. Rows past the last are read as if
    // they were that.
    int64_t first_block[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first_block[i] = (min(first_row + rows[i], a.out_features - 1) * a.in_features) >> a.shift;
      asm volatile("" : "+l"(first_block[i]));  // or the compiler computes it anew in each step, and what follows, too
    }
    uint32_t codes_at[2] = {stages.codes + place_of_codes(rows[0], 0), stages.codes + place_of_codes(rows[0], 1)};
    asm volatile("" : "+r"(codes_at[0]), "+r"(codes_at[1]));
    const float offset = kNested ? *a.nested_offset : 0.0f;
    float fetched[2] = {};
    int numbers[2] = {};
    const auto fetch = [&](int step) {
      if (step >= count) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t block = first_block[i] + ((begin + step) >> (a.shift - 6));  // a step is 2^6 values
        if constexpr (kNested) {
          numbers[i] = static_cast<const uint8_t*>(a.absmax)[block];
          fetched[i] = a.nested_absmax[block >> 8];
        } else {
          fetched[i] = static_cast<const float*>(a.absmax)[block];
        }
      }
    };
    const auto scale = [&](int which) {
      return kNested ? nested_scale(nested_code[numbers[which]], fetched[which], offset) : fetched[which];
    };
    fetch(0);
    write_pairs<kThreads>(table, values, thread);
    stages.sync();

    uint32_t copy = address_of_shared(table) + 4 * (thread & 31), byte = pair_of_byte(byte_of(thread));
    asm volatile("" : "+r"(copy), "+r"(byte));
    const auto pair_at = [&](uint32_t word) { return load_shared(pair_address(word, byte, copy)); };
    float sums[kTile / 2] = {};
    Scale<T> scaled[2] = {Scale<T>(0.0f), Scale<T>(0.0f)};
    uint32_t words[2][8], pairs[kProducts][4];
    const auto look_up = [&](int product) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[product][i] = pair_at(words[i & 1][word_of(product, i >> 1)]);
    };
    stages.template multiply<T>(
        sums, count,
        [&](int, int stage) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4 four = load_shared_16(codes_at[i & 1] + stage * kWeightBytes + (i >> 1) * kNextCodes);
            uint32_t* const to = words[i >> 1] + 4 * (i & 1);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
          }
        },
        [&](int step) {
          scaled[0] = Scale<T>(scale(0));
          scaled[1] = Scale<T>(scale(1));
          fetch(step + 1);
          look_up(0);
        },
        [&](int product, uint32_t(&weights)[4]) {
          if (product + 1 < kProducts) look_up(product + 1);
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[i] = scaled[i & 1](pairs[product][i]);
        });

    const int rank = blockIdx.z ? 0 : a.rank;
    if (rank) wait_for_previous();
    stages.add_adapter(sums, a.t, a.rank, rank, first_token, a.rows, [&](int which, int column) {
      const int64_t row = first_row + rows[which];
      if (row >= a.out_features) return 0.0f;
      const int64_t place = row * a.rank + column;
      const T value = a.wide ? rounded<T>(static_cast<const float*>(a.B)[place]) : static_cast<const T*>(a.B)[place];
      return a.scaling * static_cast<float>(value);
    });
    float bias[2] = {};
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int64_t row = first_row + rows[which];
      if (a.bias && blockIdx.z == 0 && row < a.out_features) bias[which] = static_cast<float>(a.bias[row]);
    }
    stages.write(sums, bias, rows, a.y, a.rows, a.out_features, first_token, first_row);
  }
  stages.end();
#endif
}

constexpr const char* kName = "qlora_gemm";

template <typename T, int kTile>
void launch_tile(Arguments<T>& a, const T* x, const uint8_t* packed, int parts, cudaStream_t stream) {
  const Cluster cluster(a.out_features, parts);
  a.shared = cluster.shared;
  a.x = matrix_of_tiles(kName, x, sizeof(T), a.rows, a.in_features, kTile / a.shared, 128);
  a.packed = matrix_of_tiles(kName, packed, 1, a.out_features, a.in_features / 2, kRows, 32);
  launch_kernel(kName, a.nested_code ? qlora_gemm_sm90_kernel<T, kTile, true> : qlora_gemm_sm90_kernel<T, kTile, false>,
                {.grid = dim3(cluster.tiles, static_cast<unsigned>((a.rows + kTile - 1) / kTile),
                              static_cast<unsigned>(parts)),
                 .threads = kAllThreads,
                 .stream = stream,
                 .dynamic_bytes = kDynamicBytes<kTile>,
                 .cluster = true,
                 .cluster_x = static_cast<unsigned>(a.shared),
                 .early = a.rank > 0},
                a);
}

template <typename T>
void launch(Arguments<T> a, const T* x, const uint8_t* packed, const void* A, T* t, int64_t tile, int parts,
            cudaStream_t stream) {
  if (a.rank) lora_down(kName, x, A, a.wide, t, a.in_features, a.rows, a.rank, stream);
  switch (tile) {
    case 64: return launch_tile<T, 64>(a, x, packed, parts, stream);
    case 128: return launch_tile<T, 128>(a, x, packed, parts, stream);
    default: return launch_tile<T, 256>(a, x, packed, parts, stream);
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
  STD_TORCH_CHECK(is_aligned(t), "qlora_gemm: t must be at a multiple of 16 bytes");
  STD_TORCH_CHECK(tile == 64 || tile == 128 || tile == 256, "qlora_gemm: tile must be 64, 128 or 256");
  STD_TORCH_CHECK(facts.rows <= 65535 * tile, "qlora_gemm: at most 65535 tiles of rows");
  STD_TORCH_CHECK(parts >= 1 && parts <= 8, "qlora_gemm: parts must be 1 to 8");
  const int64_t steps = facts.in_features / kStep, steps_of_part = (steps + parts - 1) / parts;
  STD_TORCH_CHECK((parts - 1) * steps_of_part < steps, "qlora_gemm: each part needs a step of 64 values of k");
  STD_TORCH_CHECK(facts.out_features < int64_t{1} << 30, "qlora_gemm: at most 2^30 out_features");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  check_hopper("qlora_gemm");
  const auto run = [&]<typename T>(T) {
    Arguments<T> a{};
    a.absmax = absmax.data_ptr();
    a.code = static_cast<const float*>(code.data_ptr());
    a.bias = pointer<T>(bias);
    a.t = static_cast<const T*>(t.data_ptr());
    a.B = pointer<void>(lora_B);
    a.nested_absmax = pointer<float>(nested_absmax);
    a.nested_offset = pointer<float>(nested_offset);
    a.nested_code = pointer<float>(nested_code);
    a.y = static_cast<T*>(y.data_ptr());
    a.in_features = facts.in_features;
    a.out_features = facts.out_features;
    a.rows = static_cast<int>(facts.rows);
    a.rank = static_cast<int>(facts.rank);
    a.shift = facts.shift;
    a.steps = static_cast<int>(steps_of_part);
    a.scaling = static_cast<float>(scaling);
    a.wide = facts.wide;
    launch(a, static_cast<const T*>(x.data_ptr()), static_cast<const uint8_t*>(packed.data_ptr()),
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
