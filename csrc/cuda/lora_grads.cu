// The gradients of the adapter and the bias: dB = scaling·dYᵀ·t with dbias = Σ dY, and dA = uᵀ·x, all by one kernel. Of
// each the sum is over the rows of a wide matrix, dY or x, times a narrow one, t or u.

#include "lora_grads.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "launch.cuh"
#include "layer.h"
#include "lora_low.cuh"
#include "ptx.cuh"
#include "ragged.cuh"
#include "types.cuh"

namespace harlora::cuda {
namespace grads {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 64;  // of the wide matrix, for a block of threads

// One of the two products. wide: (rows, columns), low: (rows, pitch), of which `rank` columns count.
template <typename T>
struct Side {
  const T* wide;
  const T* low;
  void* result;  // T, or float
  int64_t columns;
  int64_t pitch;
  float factor;
};

template <typename T>
struct Arguments {
  Side<T> of_A, of_B;
  T* bias;
  int64_t tiles_A;
  int rows;
  int rank;
  bool wide;  // float32 results
};

// Columns of the wide matrix are the rows of mma.sync, columns of the narrow one its columns, and the sum is over the
// rows of both, 16 at a time, which the warps share out. With g = lane / 4 and i = lane % 4 a lane takes four rows, 4i
// to 4i + 3, of each eight columns of the wide matrix and two of each 16 of the narrow one: neighbours of two rows make
// two registers, one for each column. kRanks: 16, where registers are left to read ahead, or 32.
template <typename T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2) lora_grads_kernel(const Arguments<T> a) {
  constexpr int kHalves = kRanks / 16;
  constexpr int kPitch = kRanks + 1;  // of sums; the last is that of dY itself
  __shared__ float parts[kWarps][16 * kPitch];
  __shared__ float totals[kColumns * kPitch];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane >> 2, column = lane & 3;
  const bool of_A = blockIdx.x < a.tiles_A;
  const Side<T> side = of_A ? a.of_A : a.of_B;
  const int64_t first_column = (blockIdx.x - (of_A ? 0 : a.tiles_A)) * kColumns;
  const int left = static_cast<int>(min(side.columns - first_column, int64_t{kColumns}));
  const int first_rank = blockIdx.y * kRanks, ranks = side.result ? min(a.rank - first_rank, kRanks) : 0;
  const bool adds = !of_A && a.bias && blockIdx.y == 0;
  const bool plain = side.columns % 8 == 0 && side.pitch % 2 == 0;
  const T* const wide = side.wide + first_column + 8 * g;
  const T* const low = side.low + first_rank + 2 * g;

  struct Read {
    uint4 eight[4];
    uint32_t two[kHalves][4];
  };
  const auto read = [&](int first) -> Read {
    Read found;
    const auto all = [&]<bool kPlain>() {  // one branch for all, so that all are on their way at once
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first + 4 * column + i;
        const bool there = row < a.rows;
        found.eight[i] = eight_or_zeros<kPlain>(wide + row * side.columns, there ? left - 8 * g : 0);
#pragma unroll
        for (int j = 0; j < kHalves; ++j) {
          found.two[j][i] =
              two_or_zeros<kPlain, T>(low + row * side.pitch + 16 * j, there ? ranks - 16 * j - 2 * g : 0);
        }
      }
    };
    if (plain) {
      all.template operator()<true>();
    } else {
      all.template operator()<false>();
    }
    return found;
  };
  float sums[4][2 * kHalves][4] = {}, added[4][4] = {};
  const uint32_t one = packed_pair(1.0f, 1.0f, T{});
  constexpr int step = 16 * kWarps;
  Read next;
  if constexpr (kHalves == 1) next = read(16 * warp);
  for (int first = 16 * warp; first < a.rows; first += step) {
    Read now;
    if constexpr (kHalves == 1) {
      now = next;
      next = read(min(first, a.rows - step) + step);  // zeros past the last, and no number too large
    } else {
      now = read(first);
    }
    const auto operand = [](uint32_t (&to)[4], uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
      to[0] = firsts(w0, w1), to[1] = seconds(w0, w1), to[2] = firsts(w2, w3), to[3] = seconds(w2, w3);
    };
    uint32_t of_low[kHalves][4];
#pragma unroll
    for (int j = 0; j < kHalves; ++j) operand(of_low[j], now.two[j][0], now.two[j][1], now.two[j][2], now.two[j][3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto word = [i](const uint4& of) { return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w; };
      uint32_t of_wide[4];
      operand(of_wide, word(now.eight[0]), word(now.eight[1]), word(now.eight[2]), word(now.eight[3]));
#pragma unroll
      for (int j = 0; j < kHalves; ++j) {
        if (16 * j >= ranks) break;
        multiply_add<T>(sums[i][2 * j], of_wide, {of_low[j][0], of_low[j][2]});
        multiply_add<T>(sums[i][2 * j + 1], of_wide, {of_low[j][1], of_low[j][3]});
      }
      // By a narrow matrix of ones, all columns of which have the same sum.
      if (adds) multiply_add<T>(added[i], of_wide, {one, one});
    }
  }

  // The sums of the warps, 16 columns at a time.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i) __syncthreads();
#pragma unroll
    for (int j = 0; j < 2 * kHalves; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int rank = 16 * (j >> 1) + 2 * (2 * column + (k & 1)) + (j & 1);
        parts[warp][(2 * g + (k >> 1)) * kPitch + rank] = sums[i][j][k];
      }
    }
    if (column == 0) {
      parts[warp][2 * g * kPitch + kRanks] = added[i][0];
      parts[warp][(2 * g + 1) * kPitch + kRanks] = added[i][2];
    }
    __syncthreads();
    const auto add = [&](int of, int rank) {
      float total = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) total += parts[k][of * kPitch + rank];
      totals[(8 * (of >> 1) + 2 * i + (of & 1)) * kPitch + rank] = total;  // from 2i on of eight
    };
#pragma unroll
    for (int j = thread; j < 16 * kRanks; j += kThreads) add(j / kRanks, j % kRanks);
    if (adds && thread < 16) add(thread, kRanks);
  }
  __syncthreads();
  const auto write = [&](int64_t place, float total) {
    if (a.wide) {
      static_cast<float*>(side.result)[place] = side.factor * total;
    } else {
      static_cast<T*>(side.result)[place] = rounded<T>(side.factor * total);
    }
  };
  if (adds && thread < kColumns && thread < left) {
    a.bias[first_column + thread] = rounded<T>(totals[thread * kPitch + kRanks]);
  }
  if (of_A) {  // (rank, columns)
    for (int i = thread; i < ranks * kColumns; i += kThreads) {
      const int rank = i / kColumns, of = i % kColumns;
      if (of < left) write((first_rank + rank) * side.columns + first_column + of, totals[of * kPitch + rank]);
    }
  } else {  // (columns, rank)
    for (int i = thread; i < kRanks * kColumns; i += kThreads) {
      const int rank = i % kRanks, of = i / kRanks;
      if (rank < ranks && of < left) {
        write((first_column + of) * a.rank + first_rank + rank, totals[of * kPitch + rank]);
      }
    }
  }
}

constexpr const char* kName = "lora_grads";

constexpr int kMostRanks = 32;  // of a block of threads

template <typename T>
void launch(const Arguments<T>& a, cudaStream_t stream) {
  const int64_t tiles_B = a.of_B.result || a.bias ? (a.of_B.columns + kColumns - 1) / kColumns : 0;
  const bool of_adapter = a.of_A.result || a.of_B.result;
  launch_kernel(kName, a.rank <= 16 ? lora_grads_kernel<T, 16> : lora_grads_kernel<T, kMostRanks>,
                {.grid = dim3(static_cast<unsigned>(a.tiles_A + tiles_B),
                              of_adapter ? static_cast<unsigned>((a.rank + kMostRanks - 1) / kMostRanks) : 1),
                 .threads = kThreads,
                 .stream = stream},
                a);
}

}  // namespace
}  // namespace grads

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace

void lora_grads(Tensor grad, std::optional<Tensor> x, std::optional<Tensor> t, std::optional<Tensor> u, double scaling,
                std::optional<Tensor> grad_bias, std::optional<Tensor> grad_A, std::optional<Tensor> grad_B,
                int64_t stream_handle) {
  constexpr const char* name = grads::kName;
  const auto type = grad.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": grad must be bfloat16 or float16");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.numel() > 0 && grad.is_contiguous() && is_aligned(grad), name,
                  ": grad must be a matrix that is not empty, contiguous at 16 bytes");
  STD_TORCH_CHECK(grad_bias || grad_A || grad_B, name, ": a gradient must be asked for");
  const int64_t rows = grad.size(0), out_features = grad.size(1);
  const int64_t rank = grad_A ? grad_A->size(0) : grad_B ? grad_B->size(1) : 0;
  const int64_t in_features = grad_A ? grad_A->size(1) : 0;
  const bool wide = (grad_A ? grad_A : grad_B) && (grad_A ? grad_A : grad_B)->scalar_type() == ScalarType::Float;
  const auto of_adapter = wide ? ScalarType::Float : type;
  STD_TORCH_CHECK(!grad_bias || is_flat(*grad_bias, type, out_features), name,
                  ": grad_bias must be out_features contiguous values in the dtype of grad");
  STD_TORCH_CHECK(!grad_A || (rank > 0 && in_features > 0 && in_features % 8 == 0 && x && u &&
                              is_flat(*grad_A, of_adapter, rank * in_features) &&
                              is_flat(*x, type, rows * in_features) && is_aligned(*x) &&
                              is_flat(*u, type, rows * padded_rank(rank)) && is_aligned(*u)),
                  name, ": grad_A, x and u must be contiguous at 16 bytes and fit each other, in the dtype of grad or, "
                  "grad_A, float32");
  STD_TORCH_CHECK(!grad_B || (rank > 0 && t && is_flat(*grad_B, of_adapter, out_features * rank) &&
                              is_flat(*t, type, rows * rank) && is_aligned(*t)),
                  name, ": grad_B and t must be contiguous at 16 bytes and fit each other, in the dtype of grad or, "
                  "grad_B, float32");
  STD_TORCH_CHECK(rows < int64_t{1} << 30 && rank <= 65535 * grads::kMostRanks, name,
                  ": too many rows, or too large a rank");
  torch::stable::accelerator::DeviceGuard guard(grad.get_device());
  const auto run = [&]<typename T>(T) {
    const auto of = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; };
    const T* const of_grad = static_cast<const T*>(grad.data_ptr());
    grads::launch(
        grads::Arguments<T>{
            {pointer<T>(x), pointer<T>(u), of(grad_A), in_features, padded_rank(rank), 1.0f},
            {of_grad, t ? pointer<T>(t) : of_grad, of(grad_B), out_features, rank, static_cast<float>(scaling)},
            static_cast<T*>(of(grad_bias)),
            (in_features + grads::kColumns - 1) / grads::kColumns,
            static_cast<int>(rows),
            static_cast<int>(rank),
            wide},
        reinterpret_cast<cudaStream_t>(stream_handle));
  };
  if (type == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(__half{});
  }
}

}  // namespace harlora::cuda
