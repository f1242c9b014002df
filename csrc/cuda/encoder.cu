// A small encoder, whole, for inference: one launch, in which a block of threads, or a cluster of them, takes a few
// windows through all blocks. Activations stay in shared memory; packed weights come from the second cache, in which
// all of them are.
//
// Every layer is yᵀ = Ŵ·xᵀ by mma.sync as in qlora_gemv.cu: rows of the weight are the rows of the product, tokens its
// columns, and the codes that a lane reads become its operand through the table of pairs. A warp takes 16 rows of the
// weight at a time, and has the codes of the next 16 on their way, past barriers too: they depend on nothing. Blocks of
// a cluster share the rows of every weight; what one computes it writes into the shared memory of all.

#include "encoder.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

#include "launch.cuh"
#include "layer.h"
#include "lora_down.cuh"
#include "nf4.cuh"
#include "ptx.cuh"
#include "qlora_gemv.cuh"
#include "types.cuh"

namespace harlora::cuda {
namespace whole {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostBlocks = 8;  // whose layers find room in the 4 KB of a kernel's arguments
constexpr int kStep = 64;       // values of k; a scale holds for all of them
constexpr int kRows = 16;       // of the weight, for a warp
constexpr int kPad = 8;         // values after each row of activations: the next begins in other banks
constexpr int kWidth = 256;     // at most
constexpr int kHead = 64;       // width of a head, at most
constexpr int kLow = 3072;      // sums of t that find room, more only for adapters of high rank; and values after each
constexpr int kLowPad = 4;

// The layers of a block in the order in which they run; q, k and v together.
enum Role { kQkv, kO, kFc1, kFc2, kRoles };
constexpr int kLayers = 6;

struct Layer {
  const uint8_t* packed;
  const void* absmax;
  const float* nested_absmax;
  const float* nested_offset;
  const void* bias;
  const void* A;  // of x's type, or float if `wide`
  const void* B;
  float scaling;
};

struct Norm {
  const void* weight;
  const void* bias;
  float eps;
};

template <typename T>
struct Arguments {
  const T* x;
  T* y;
  const float* code;
  const float* nested_code;
  int64_t windows;
  int tokens, windows_of_block;
  int width, hidden, heads;
  int rank, shift;  // log2(blocksize)
  int blocks;
  bool wide, ends;  // ends: with the last norm
  Layer layers[kLayers * kMostBlocks];
  Norm norms[2 * kMostBlocks + 1];
};
static_assert(sizeof(Arguments<__half>) <= 4096);

// Where things lie in shared memory, in bytes from its begin; rows are tokens.
struct Places {
  int x, n, wide, low, nested_code, values, bytes;
  int pitch, wide_pitch;  // values from a row to the next
  HARLORA_HOST_DEVICE Places(int width, int hidden, int rank, int tokens) {
    pitch = width + kPad;
    wide_pitch = hidden + kPad;
    const int of_wide = 3 * pitch > wide_pitch ? 3 * pitch : wide_pitch;
    const int columns = 3 * ((rank + 15) / 16 * 16);
    x = 4 * kPairWords;
    n = x + 2 * tokens * pitch;
    wide = n + 2 * tokens * pitch;  // q, k and v, one after the other, or gelu(fc1)
    low = wide + 2 * tokens * of_wide;
    const int of_low = columns * tokens > kLow ? columns * tokens : kLow;
    nested_code = low + (rank ? 4 * (of_low + 4 * tokens * kLowPad) : 0);
    values = nested_code + 1024;
    bytes = values + 32;
  }
};

// What a warp reads of its 16 rows at a time, steps of 64 values of k: codes of two rows for each lane, and what their
// scales are made of.
template <int kSteps>
struct Unit {
  uint2 codes[kSteps][2];
  float scales[kSteps][2];
  int numbers[kSteps][2];
};

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// Blocks of threads for which a multiprocessor is to have registers; before sm_90 it has memory for one of 32 rows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int kTokenTiles>
constexpr int kAtOnce = kTokenTiles == 2 ? 2 : 1;
#else
template <int kTokenTiles>
constexpr int kAtOnce = kTokenTiles == 8 ? 1 : 2;
#endif

// Up to four values of an adapter, two in a word, zeros for the rest; float32 is rounded.
template <typename T>
__device__ __noinline__ uint2 several(const void* from, bool wide, int place, int count) {
  float four[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    four[i] = wide ? static_cast<const float*>(from)[place + i]
                   : static_cast<float>(static_cast<const T*>(from)[place + i]);
  }
  return {packed_pair(four[0], four[1], T{}), packed_pair(four[2], four[3], T{})};
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kAtOnce<kTokenTiles>)
    encoder_kernel(const __grid_constant__ Arguments<T> a) {
  constexpr int tokens = 8 * kTokenTiles;
  constexpr int kUnit = kTokenTiles == 2 ? 4 : 2;  // as registers allow
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int row = lane >> 2, column = lane & 3;
  const int parts = gridDim.z, part = blockIdx.z;
  const int first = warp * parts + part, stride = kWarps * parts;  // tiles of 16 rows of a weight
  const Places places(a.width, a.hidden, a.rank, tokens);
  uint8_t* const shared = dynamic_shared();
  const uint32_t base = address_of_shared(shared);
  const int64_t first_window = static_cast<int64_t>(blockIdx.x) * a.windows_of_block;
  const int windows = static_cast<int>(min(a.windows - first_window, static_cast<int64_t>(a.windows_of_block)));
  const int rows_there = windows * a.tokens;
  const int64_t first_value = first_window * a.tokens * a.width;
  const auto everyone = [&] {
    if (parts == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  };
  const auto store = [&](uint32_t address, uint32_t word) {
    if (parts == 1) return store_shared(address, word);
#pragma unroll 1
    for (int of = 0; of < parts; ++of) store_cluster(shared_of(of, address), word);
  };

  const int groups = kRoles * a.blocks;
  const auto in_features = [&](int role) { return role == kFc2 ? a.hidden : a.width; };
  const auto out_features = [&](int role) { return role == kFc1 ? a.hidden : a.width; };
  const auto tiles_of = [&](int role) { return out_features(role) / kRows * (role == kQkv ? 3 : 1); };
  const auto matrix_of = [&](int role, int tile) {
    return role == kQkv ? (tile * kRows >= a.width) + (tile * kRows >= 2 * a.width) : 0;
  };
  const auto layer_of = [&](int group, int matrix) -> const Layer& {
    const int role = group % kRoles;
    return a.layers[kLayers * (group / kRoles) + (role == kQkv ? matrix : role + 2)];
  };

  // The next unit that is read: of all layers, tile after tile of this warp.
  int next_group = 0, next_tile = first, next_step = 0;
  const auto skip = [&] {
    while (next_group < groups && next_tile >= tiles_of(next_group % kRoles)) {
      ++next_group;
      next_tile = first;
    }
  };
  const auto read = [&](Unit<kUnit>& into) {
    if (next_group >= groups) return;
    const int role = next_group % kRoles, width = in_features(role), steps = width / kStep;
    const int matrix = matrix_of(role, next_tile);
    const Layer& layer = layer_of(next_group, matrix);
    Unit<kUnit> fresh;  // of which only what is there is used
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int place = (next_tile * kRows - matrix * a.width + row + 8 * which) * steps + next_step;  // of 64 values
      const uint8_t* const codes = layer.packed + place * (kStep / 2) + 8 * column;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (next_step + i >= steps) break;
        fresh.codes[i][which] = load_once(codes + i * (kStep / 2));
        const int block = (place + i) >> (a.shift - 6);
        if (a.nested_code) {
          fresh.numbers[i][which] = static_cast<const uint8_t*>(layer.absmax)[block];
          fresh.scales[i][which] = layer.nested_absmax[block >> 8];
        } else {
          fresh.scales[i][which] = static_cast<const float*>(layer.absmax)[block];
        }
      }
    }
    into = fresh;
    next_step += kUnit;
    if (next_step >= steps) {
      next_step = 0;
      next_tile += stride;
      skip();
    }
  };
  skip();
  Unit<kUnit> next = {};
  read(next);

  // The table, the windows, and zeros for the rows after them.
  uint32_t* const table = reinterpret_cast<uint32_t*>(shared);
  uint16_t* const values = reinterpret_cast<uint16_t*>(shared + places.values);
  float* const nested_code = reinterpret_cast<float*>(shared + places.nested_code);
  if (threadIdx.x < 16) values[threadIdx.x] = pattern(rounded<T>(a.code[threadIdx.x]));
  if (a.nested_code) nested_code[threadIdx.x] = a.nested_code[threadIdx.x];
  for (int i = threadIdx.x; i < tokens * (a.width / 8); i += kThreads) {
    const int token = i / (a.width / 8), place = i % (a.width / 8) * 8;
    uint4 eight_values = {};
    if (token < rows_there) {
      eight_values = *reinterpret_cast<const uint4*>(a.x + first_value + token * a.width + place);
    }
    *reinterpret_cast<uint4*>(shared + places.x + 2 * (token * places.pitch + place)) = eight_values;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPairWords; i += kThreads) table[i] = pair_of(values, i / kPairCopies);
  everyone();  // nobody writes into a block that has not begun

  const auto word_at = [&](int place) { return *reinterpret_cast<const uint32_t*>(shared + place); };
  const auto pair_of_type = [&](const void* from, int place) {
    return unpacked(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(from) + place), T{});
  };
  // LayerNorm of the rows of x from `begin`, every `every`th; put(row, word of two values, where).
  const auto norm_rows = [&](const Norm& norm, int begin, int every, int end, auto put) {
    const int words = a.width / 64;
    for (int token = begin; token < end; token += every) {
      float2 x[kWidth / 64] = {};
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kWidth / 64; ++i) {
        if (i >= words) break;
        x[i] = unpacked(word_at(places.x + 2 * (token * places.pitch + 64 * i + 2 * lane)), T{});
        sum += x[i].x + x[i].y;
      }
#pragma unroll
      for (int with = 16; with; with /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, with);
      const float mean = sum / static_cast<float>(a.width);
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kWidth / 64; ++i) {
        if (i >= words) break;
        x[i].x -= mean;
        x[i].y -= mean;
        squares += x[i].x * x[i].x + x[i].y * x[i].y;
      }
#pragma unroll
      for (int with = 16; with; with /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, with);
      const float inverse = rsqrtf(squares / static_cast<float>(a.width) + norm.eps);
#pragma unroll
      for (int i = 0; i < kWidth / 64; ++i) {
        if (i >= words) break;
        const int place = 64 * i + 2 * lane;
        const float2 weight = pair_of_type(norm.weight, place), bias = pair_of_type(norm.bias, place);
        put(token, place, packed_pair(x[i].x * inverse * weight.x + bias.x, x[i].y * inverse * weight.y + bias.y, T{}));
      }
    }
  };

  // softmax(q·kᵀ / √size)·v, of 16 tokens, one head and one window at a time, to n.
  const auto attend = [&] {
    const int size = a.width / a.heads, query_tiles = (a.tokens + 15) / 16, key_tiles = (a.tokens + 7) / 8;
    const float scale = rsqrtf(static_cast<float>(size)) * 1.44269504f;  // to the base of 2
    const int of_matrix = 2 * tokens * places.pitch;
    for (int task = first; task < windows * a.heads * query_tiles; task += stride) {
      const int queries = task % query_tiles * 16, head = task / query_tiles % a.heads;
      const int begin = task / (query_tiles * a.heads) * a.tokens;
      // A token past the last of the window is read as if it were that: no other window's values come in.
      const auto place_of = [&](int matrix, int token, int in_head) {
        return places.wide + matrix * of_matrix +
               2 * ((begin + min(token, a.tokens - 1)) * places.pitch + head * size + in_head);
      };
      float scores[kTokenTiles][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kHead / 16; ++chunk) {
        if (16 * chunk >= size) break;
        const int in_head = 16 * chunk + 4 * column;
        const uint2 of_q[2] = {
            *reinterpret_cast<const uint2*>(shared + place_of(0, queries + row, in_head)),
            *reinterpret_cast<const uint2*>(shared + place_of(0, queries + row + 8, in_head))};
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          if (tile >= key_tiles) break;
          const uint2 of_k = *reinterpret_cast<const uint2*>(shared + place_of(1, 8 * tile + row, in_head));
          multiply_add<T>(scores[tile], {of_q[0].x, of_q[1].x, of_q[0].y, of_q[1].y}, {of_k.x, of_k.y});
        }
      }
      float most[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[tile][i] = 8 * tile + 2 * column + (i & 1) < a.tokens ? scores[tile][i] * scale : -INFINITY;
          most[i >> 1] = fmaxf(most[i >> 1], scores[tile][i]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int with = 1; with < 4; with *= 2) {
          most[half] = fmaxf(most[half], __shfl_xor_sync(0xFFFFFFFFu, most[half], with));
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[tile][i] = exp2f(scores[tile][i] - most[i >> 1]);
          total[i >> 1] += scores[tile][i];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int with = 1; with < 4; with *= 2) {
          total[half] += __shfl_xor_sync(0xFFFFFFFFu, total[half], with);
        }
        total[half] = 1.0f / total[half];
      }
      float sums[kHead / 8][4] = {};
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; tile += 2) {
        if (tile >= key_tiles) break;
        uint32_t weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&of)[4] = scores[tile + (i >> 1)];
          const int half = i & 1;
          weights[i] = packed_pair(of[2 * half] * total[half], of[2 * half + 1] * total[half], T{});
        }
#pragma unroll
        for (int i = 0; i < kHead / 8; ++i) {
          if (8 * i >= size) break;
          uint32_t of_v[2];
          load_transposed(of_v, base + place_of(2, 8 * tile + lane % 16, 8 * i));
          multiply_add<T>(sums[i], weights, of_v);
        }
      }
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        if (8 * i >= size) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = queries + row + 8 * half;
          if (token >= a.tokens) continue;
          store(base + places.n + 2 * ((begin + token) * places.pitch + head * size + 8 * i + 2 * column),
                packed_pair(sums[i][2 * half], sums[i][2 * half + 1], T{}));
        }
      }
    }
  };

  // Of 64 rows of x shared memory has most to do: every second word of codes is decoded without.
  constexpr bool by_planes = kTokenTiles == 8;
  const Planes planes(values);
  const uint32_t copy = base + 4 * lane;
  const auto pair_at = [copy](uint32_t place) { return load_shared(copy + place); };
  const int rank_tiles = (a.rank + 15) / 16;
  for (int group = 0; group < groups; ++group) {
    const int role = group % kRoles, width = in_features(role), steps = width / kStep, tiles = tiles_of(role);
    if (role == kQkv || role == kFc1) {
      norm_rows(a.norms[2 * (group / kRoles) + (role == kFc1)], warp, kWarps, tokens,
                [&](int token, int place, uint32_t word) {
                  store_shared(base + places.n + 2 * (token * places.pitch + place), word);
                });
      __syncthreads();
    } else if (role == kO) {
      attend();
      everyone();
    }
    const int in_pitch = role == kFc2 ? places.wide_pitch : places.pitch;
    const uint32_t in = base + (role == kFc2 ? places.wide : places.n) + 2 * (row * in_pitch + 16 * column);

    // t = x·lora_Aᵀ, for each 16 ranks and some of the steps; added up where it is read. By the last warps, which have
    // fewer rows of the weight.
    const int columns = (role == kQkv ? 3 : 1) * 16 * rank_tiles, low_pitch = columns + kLowPad;
    const int splits = min(min(4, steps), max(1, kLow / (tokens * max(1, columns))));
    float* const low = reinterpret_cast<float*>(shared + places.low);
    for (int item = kWarps - 1 - warp; item < columns / 16 * splits; item += kWarps) {
      const int split = item % splits, first_column = item / splits * 16;
      const int first_rank = first_column % (16 * rank_tiles);
      const Layer& layer = layer_of(group, first_column / (16 * rank_tiles));
      float sums[kTokenTiles][4] = {};
      for (int step = split; step < steps; step += splits) {
        uint4 of_A[2][2] = {};
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int of = first_rank + row + 8 * which;
          if (of >= a.rank) continue;
          const int64_t place = of * width + step * kStep + 16 * column;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            of_A[which][half] = a.wide ? eight<T, true>(layer.A, place + 8 * half)
                                       : eight<T, false>(layer.A, place + 8 * half);
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 x = load_shared_16(in + 2 * (8 * tile * in_pitch + step * kStep + 8 * half));
            const uint4 &r0 = of_A[0][half], &r1 = of_A[1][half];
            multiply_add<T>(sums[tile], {r0.x, r1.x, r0.y, r1.y}, {x.x, x.y});
            multiply_add<T>(sums[tile], {r0.z, r1.z, r0.w, r1.w}, {x.z, x.w});
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * tile + 2 * column + (i & 1);
          low[(split * tokens + token) * low_pitch + first_column + row + 8 * (i >> 1)] = sums[tile][i];
        }
      }
    }

    for (int tile = first; tile < tiles || tile == first; tile += stride) {
      const bool there = tile < tiles;
      const int matrix = matrix_of(role, tile), first_row = tile * kRows - matrix * a.width;
      const Layer& layer = layer_of(group, matrix);
      // Four ranks in a row of each of two rows of lora_B, and the biases, which are needed last and asked for first.
      const auto read_B = [&](int chunk, uint2 (&of_B)[2]) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const int of = 16 * chunk + 4 * column, place = (first_row + row + 8 * which) * a.rank + of;
          of_B[which] = {};
          if (a.rank % 4 == 0 && !a.wide) {
            if (of < a.rank) of_B[which] = *reinterpret_cast<const uint2*>(static_cast<const T*>(layer.B) + place);
          } else {
            of_B[which] = several<T>(layer.B, a.wide, place, a.rank - of);
          }
        }
      };
      uint2 of_B[2] = {};
      T biases[2] = {};
      if (there) {
        if (a.rank) read_B(0, of_B);
        if (layer.bias) {
          biases[0] = static_cast<const T*>(layer.bias)[first_row + row];
          biases[1] = static_cast<const T*>(layer.bias)[first_row + row + 8];
        }
      }
      float total[kTokenTiles][4] = {};
      for (int unit = 0; unit < steps && there; unit += kUnit) {
        const Unit<kUnit> now = next;
        read(next);
        const float offset = a.nested_code ? *layer.nested_offset : 0.0f;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          const int step = unit + i;
          if (step >= steps) break;
          const uint32_t codes[2][2] = {{now.codes[i][0].x, now.codes[i][0].y}, {now.codes[i][1].x, now.codes[i][1].y}};
          float sums[kTokenTiles][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t weights[2][4];
            if (by_planes && half == 1) {
              uint32_t first[4], second[4];
              planes.pairs(codes[0][1], first);
              planes.pairs(codes[1][1], second);
#pragma unroll
              for (int j = 0; j < 8; ++j) weights[j / 4][j % 4] = (j & 1 ? second : first)[j / 4 * 2 + j % 4 / 2];
            } else {
#pragma unroll
              for (int product = 0; product < 2; ++product) {
                gemv::weight_operand(pair_at, codes[0], codes[1], 2 * half + product, weights[product]);
              }
            }
#pragma unroll
            for (int of = 0; of < kTokenTiles; ++of) {
              const uint4 x = load_shared_16(in + 2 * (8 * of * in_pitch + step * kStep + 8 * half));
              multiply_add<T>(sums[of], weights[0], {x.x, x.y});
              multiply_add<T>(sums[of], weights[1], {x.z, x.w});
            }
          }
          const auto scale = [&](int which) {
            return a.nested_code ? nested_scale(nested_code[now.numbers[i][which]], now.scales[i][which], offset)
                                 : now.scales[i][which];
          };
          const float scales[2] = {scale(0), scale(1)};
#pragma unroll
          for (int of = 0; of < kTokenTiles; ++of) gemv::add_scaled(total[of], sums[of], scales[0], scales[1]);
        }
      }
      if (tile == first && a.rank) __syncthreads();  // t is there
      if (!there) continue;

      float adapter[kTokenTiles][4] = {};
#pragma unroll 1
      for (int chunk = 0; chunk < rank_tiles; ++chunk) {
        if (chunk) read_B(chunk, of_B);
        const uint32_t weights[4] = {of_B[0].x, of_B[1].x, of_B[0].y, of_B[1].y};
#pragma unroll
        for (int of = 0; of < kTokenTiles; ++of) {
          const float* from = low + (8 * of + row) * low_pitch + 16 * (matrix * rank_tiles + chunk) + 4 * column;
          float4 t = *reinterpret_cast<const float4*>(from);
#pragma unroll 1
          for (int split = 1; split < splits; ++split) {
            from += tokens * low_pitch;
            const float4 more = *reinterpret_cast<const float4*>(from);
            t.x += more.x, t.y += more.y, t.z += more.z, t.w += more.w;
          }
          multiply_add<T>(adapter[of], weights, {packed_pair(t.x, t.y, T{}), packed_pair(t.z, t.w, T{})});
        }
      }
#pragma unroll
      for (int of = 0; of < kTokenTiles; ++of) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const auto y = [&](int i) {
            const int sum = 2 * which + i;
            return total[of][sum] + static_cast<float>(biases[which]) + layer.scaling * adapter[of][sum];
          };
          // Two tokens of a row become two rows of a token.
          uint32_t word = transposed(packed_pair(y(0), y(1), T{}));
          const int token = 8 * of + row, out = first_row + 8 * which + 2 * column;
          int place = places.x + 2 * (token * places.pitch + out);
          if (role == kQkv) {
            place = places.wide + 2 * ((matrix * tokens + token) * places.pitch + out);
          } else if (role == kFc1) {
            const float2 h = unpacked(word, T{});
            word = packed_pair(gelu(h.x), gelu(h.y), T{});
            place = places.wide + 2 * (token * places.wide_pitch + out);
          } else {
            const float2 more = unpacked(word, T{}), x = unpacked(word_at(place), T{});
            word = packed_pair(x.x + more.x, x.y + more.y, T{});
          }
          store(base + place, word);
        }
      }
    }
    everyone();
  }

  if (a.ends) {
    norm_rows(a.norms[2 * a.blocks], first, stride, rows_there, [&](int token, int place, uint32_t word) {
      *reinterpret_cast<uint32_t*>(a.y + first_value + token * a.width + place) = word;
    });
    return;
  }
  for (int i = part * kThreads + threadIdx.x; i < rows_there * (a.width / 8); i += parts * kThreads) {
    const int token = i / (a.width / 8), place = i % (a.width / 8) * 8;
    *reinterpret_cast<uint4*>(a.y + first_value + token * a.width + place) =
        *reinterpret_cast<const uint4*>(shared + places.x + 2 * (token * places.pitch + place));
  }
}

constexpr const char* kName = "encoder_blocks";

template <typename T, int kTokenTiles>
void launch(const Arguments<T>& a, int parts, cudaStream_t stream) {
  const int64_t blocks = (a.windows + a.windows_of_block - 1) / a.windows_of_block;
  launch_kernel(kName, encoder_kernel<T, kTokenTiles>,
                {.grid = dim3(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(parts)),
                 .threads = kThreads,
                 .stream = stream,
                 .dynamic_bytes = static_cast<size_t>(Places(a.width, a.hidden, a.rank, 8 * kTokenTiles).bytes),
                 .cluster = parts > 1},
                a);
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensors in their order, each checked as it is taken.
class Taken {
 public:
  Taken(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  const Tensor& peek() const {
    STD_TORCH_CHECK(place_ < tensors_.size(), kName, ": tensors are too few");
    return tensors_[place_];
  }
  const void* next(ScalarType type, int64_t numel, uintptr_t multiple = 4) {
    const Tensor& tensor = peek();
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == numel &&
                        reinterpret_cast<uintptr_t>(tensor.data_ptr()) % multiple == 0,
                    kName, ": tensor ", place_, " must have ", numel, " contiguous values at a multiple of ", multiple,
                    " bytes, in the dtype of its place");
    ++place_;
    return tensor.data_ptr();
  }
  bool ended() const { return place_ == tensors_.size(); }

 private:
  const std::vector<Tensor>& tensors_;
  size_t place_ = 0;
};

struct Format {
  ScalarType type;
  int64_t blocksize;
  bool nested, bias, adapter;
  int64_t rank;  // below 0 before the first adapter
  bool wide;
};

Norm norm_of(Taken& taken, const Format& format, int64_t width, double eps) {
  Norm norm{};
  norm.weight = taken.next(format.type, width);
  norm.bias = taken.next(format.type, width);
  norm.eps = static_cast<float>(eps);
  return norm;
}

Layer layer_of(Taken& taken, Format& format, int64_t in_features, int64_t out_features, double scaling) {
  Layer layer{};
  const int64_t weights = in_features * out_features, blocks = (weights + format.blocksize - 1) / format.blocksize;
  layer.packed = static_cast<const uint8_t*>(taken.next(ScalarType::Byte, weights / 2, 16));
  if (format.nested) {
    layer.absmax = taken.next(ScalarType::Byte, blocks, 1);
    layer.nested_absmax = static_cast<const float*>(taken.next(ScalarType::Float, (blocks + 255) / 256));
    layer.nested_offset = static_cast<const float*>(taken.next(ScalarType::Float, 1));
  } else {
    layer.absmax = taken.next(ScalarType::Float, blocks);
  }
  if (format.bias) layer.bias = taken.next(format.type, out_features, 2);
  if (format.adapter) {
    if (format.rank < 0) {
      format.rank = taken.peek().numel() / in_features;
      format.wide = taken.peek().scalar_type() == ScalarType::Float;
      STD_TORCH_CHECK(format.rank > 0, kName, ": lora_A must have a rank of at least 1");
    }
    const auto type = format.wide ? ScalarType::Float : format.type;
    layer.A = taken.next(type, format.rank * in_features, 16);
    layer.B = taken.next(type, out_features * format.rank, 16);
    layer.scaling = static_cast<float>(scaling);
  }
  return layer;
}

template <typename T>
void run(const Tensor& x, const std::vector<Tensor>& tensors, int64_t heads, int64_t hidden, Format format,
         const std::vector<double>& eps, const std::vector<double>& scaling, const Tensor& code, const Tensor& y,
         int64_t token_tiles, int64_t parts, const float* nested_code, cudaStream_t stream) {
  const int64_t width = x.size(2), blocks = static_cast<int64_t>(scaling.size()) / kLayers;
  Taken taken(tensors);
  Arguments<T> a{};
  a.x = static_cast<const T*>(x.data_ptr());
  a.y = static_cast<T*>(y.data_ptr());
  a.code = static_cast<const float*>(code.data_ptr());
  a.nested_code = nested_code;
  a.windows = x.size(0);
  a.tokens = static_cast<int>(x.size(1));
  a.windows_of_block = static_cast<int>(8 * token_tiles / x.size(1));
  a.width = static_cast<int>(width);
  a.hidden = static_cast<int>(hidden);
  a.heads = static_cast<int>(heads);
  while ((int64_t{1} << a.shift) < format.blocksize) ++a.shift;
  // All is checked before the first launch.
  std::vector<Norm> norms;
  std::vector<Layer> layers;
  for (int64_t block = 0; block < blocks; ++block) {
    const double* const of = scaling.data() + kLayers * block;
    norms.push_back(norm_of(taken, format, width, eps[2 * block]));
    for (int i = 0; i < 4; ++i) layers.push_back(layer_of(taken, format, width, width, of[i]));
    norms.push_back(norm_of(taken, format, width, eps[2 * block + 1]));
    layers.push_back(layer_of(taken, format, width, hidden, of[4]));
    layers.push_back(layer_of(taken, format, hidden, width, of[5]));
  }
  norms.push_back(norm_of(taken, format, width, eps.back()));
  STD_TORCH_CHECK(taken.ended(), kName, ": tensors are too many");
  a.rank = static_cast<int>(std::max<int64_t>(format.rank, 0));
  a.wide = format.wide;
  for (int64_t begin = 0; begin < blocks; begin += kMostBlocks) {
    a.blocks = static_cast<int>(std::min<int64_t>(kMostBlocks, blocks - begin));
    a.ends = begin + a.blocks == blocks;
    std::copy_n(layers.data() + kLayers * begin, kLayers * a.blocks, a.layers);
    std::copy_n(norms.data() + 2 * begin, 2 * a.blocks + 1, a.norms);
    switch (token_tiles) {
      case 2: launch<T, 2>(a, static_cast<int>(parts), stream); break;
      case 4: launch<T, 4>(a, static_cast<int>(parts), stream); break;
      default: launch<T, 8>(a, static_cast<int>(parts), stream);
    }
    a.x = a.y;  // each block of threads reads its windows before it writes them
  }
}

}  // namespace whole

int64_t encoder_shared_bytes(int64_t width, int64_t hidden, int64_t rank, int64_t token_tiles) {
  return whole::Places(static_cast<int>(width), static_cast<int>(hidden), static_cast<int>(rank),
                       static_cast<int>(8 * token_tiles))
      .bytes;
}

void encoder_blocks(torch::stable::Tensor x, std::vector<torch::stable::Tensor> tensors, int64_t heads, int64_t hidden,
                    int64_t blocksize, bool bias, bool adapter, std::vector<double> eps, std::vector<double> scaling,
                    torch::stable::Tensor code, torch::stable::Tensor y, int64_t token_tiles, int64_t parts,
                    std::optional<torch::stable::Tensor> nested_code, int64_t stream_handle) {
  using namespace whole;
  const auto type = x.scalar_type();
  const auto aligned = [](const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; };
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kName, ": x must be bfloat16 or float16");
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && aligned(x) && y.is_contiguous() && aligned(y) && x.numel() > 0 &&
                      y.scalar_type() == type && y.numel() == x.numel(),
                  kName, ": x and y must be (windows, tokens, width), of one dtype, contiguous at 16 bytes");
  const int64_t width = x.size(2), blocks = static_cast<int64_t>(scaling.size()) / kLayers;
  STD_TORCH_CHECK(width % kStep == 0 && width <= kWidth && hidden > 0 && hidden % kStep == 0, kName,
                  ": width and hidden must be multiples of 64, width at most 256");
  STD_TORCH_CHECK(heads > 0 && width % heads == 0 && width / heads % 16 == 0 && width / heads <= kHead, kName,
                  ": width / heads must be a multiple of 16, at most 64");
  STD_TORCH_CHECK(token_tiles == 2 || token_tiles == 4 || token_tiles == 8, kName, ": token_tiles must be 2, 4 or 8");
  STD_TORCH_CHECK(x.size(1) <= 8 * token_tiles, kName, ": a window must have at most 8 tokens for each of token_tiles");
  STD_TORCH_CHECK(parts == 1 || parts == 2 || parts == 4 || parts == 8, kName, ": parts must be 1, 2, 4 or 8");
  STD_TORCH_CHECK(blocksize >= kStep && (blocksize & (blocksize - 1)) == 0, kName,
                  ": blocksize must be a power of two of at least 64");
  STD_TORCH_CHECK(blocks > 0 && scaling.size() == static_cast<size_t>(kLayers * blocks) &&
                      eps.size() == static_cast<size_t>(2 * blocks + 1),
                  kName, ": scaling must have six values for each block, eps two and one for the last norm");
  STD_TORCH_CHECK(code.is_contiguous() && code.scalar_type() == ScalarType::Float && code.numel() == 16 &&
                      (!nested_code || (nested_code->is_contiguous() && nested_code->numel() == 256 &&
                                        nested_code->scalar_type() == ScalarType::Float)),
                  kName, ": code must be 16 and nested_code 256 contiguous float32 values");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const Format format{type, blocksize, nested_code.has_value(), bias, adapter, -1, false};
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (type == ScalarType::BFloat16) {
    run<__nv_bfloat16>(x, tensors, heads, hidden, format, eps, scaling, code, y, token_tiles, parts,
                       pointer<float>(nested_code), stream);
  } else {
    run<__half>(x, tensors, heads, hidden, format, eps, scaling, code, y, token_tiles, parts,
                pointer<float>(nested_code), stream);
  }
}

}  // namespace harlora::cuda
