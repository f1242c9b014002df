// A small encoder, whole, for inference: one launch, in which a block of threads, or a cluster of them, takes a few
// windows through all blocks. Activations stay in shared memory; packed weights come from the second cache, in which
// all of them are.
//
// Every layer is yᵀ = Ŵ·xᵀ by mma.sync as in qlora_gemv.cu: rows of the weight are the rows of the product, tokens its
// columns, and the codes that a lane reads become its operand through the table of pairs. A warp takes 16 rows of the
// weight at a time, or some steps of k of them where there are more warps than tiles, and has the next codes on their
// way, past barriers too: they depend on nothing. Blocks of a cluster share the rows of every weight; what one computes
// it sends into the shared memory of the others, where a barrier counts the bytes: a barrier of the cluster would wait
// for all memory at each layer. No block needs another's leave to send: it has all of the last layer, which each block
// sent after it read what is now overwritten. So each has rows of every weight.

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

// Of a block of threads, which has a multiprocessor for itself: as many as registers allow, and of 16 rows as many as
// the package's own encoder has tiles or halves and thirds of them for each of two blocks.
constexpr int kMostWarps = 18;
template <int kTokenTiles, bool kNested>
constexpr int kWarpsOf = kTokenTiles == 8 ? 8 : kTokenTiles == 4 ? 12 : kNested ? 16 : kMostWarps;
constexpr int kMostBlocks = 8;  // whose layers find room in the 4 KB of a kernel's arguments
constexpr int kStep = 64;       // values of k; a scale holds for all of them
constexpr int kRows = 16;       // of the weight, for a warp
constexpr int kPad = 8;         // values after each row of activations: the next begins in other banks
constexpr int kWidth = 256;     // at most
constexpr int kHead = 64;       // width of a head, at most
constexpr int kLowPad = 4;      // values after each row of t
constexpr int kLowSplits = 4;   // sums of t that are added up, at most

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
  float of_width;   // 1 / width
  Layer layers[kLayers * kMostBlocks];
  Norm norms[2 * kMostBlocks + 1];
};
static_assert(sizeof(Arguments<__half>) <= 4096);

// Of up to 32 rows there is room for sums of several warps for one tile.
HARLORA_HOST_DEVICE constexpr bool is_roomy(int tokens) { return tokens <= 32; }
// Sums of t that find room, more only for adapters of high rank.
HARLORA_HOST_DEVICE constexpr int low_values(int tokens) { return tokens == 32 ? 4608 : 3072; }

// Where things lie in shared memory, in bytes from its begin; rows are tokens.
struct Places {
  int x, n, wide, low, sums, plans, nested_code, values, arrivals, bytes;
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
    const int of_low = columns * tokens > low_values(tokens) ? columns * tokens : low_values(tokens);
    sums = low + (rank ? 4 * (of_low + kLowSplits * tokens * kLowPad) : 0);
    plans = sums + (is_roomy(tokens) ? kMostWarps * kRows * tokens * 4 : 0);
    nested_code = plans + 16 * kRoles * (is_roomy(tokens) ? kMostWarps : kWarpsOf<8, false>);
    values = nested_code + 1024;
    arrivals = values + 32;
    bytes = arrivals + 16;
  }
};

// What a warp reads of its 16 rows at a time, steps of 64 values of k: codes of two rows for each lane, and what their
// scales are made of.
template <int kSteps, bool kNested>
struct Unit {
  uint2 codes[kSteps][2];
  float scales[kSteps][2];
  int numbers[kNested ? kSteps : 1][2];
  float offset;
};

// What a warp does for each group of layers: the first tile of 16 rows, past the last if none, of k the steps from
// `begin` to `end`, which are part `split` of `splits`; and of t which 16 columns, below 0 if none, and which part.
struct Plan {
  int tile, begin, end, split, splits, column, low_split, low_splits;
  Plan() = default;
  __device__ explicit Plan(uint4 words)
      : tile(static_cast<int>(words.x)),
        begin(static_cast<int>(words.y & 0xFF)),
        end(static_cast<int>(words.y >> 8 & 0xFF)),
        split(static_cast<int>(words.y >> 16 & 0xFF)),
        splits(static_cast<int>(words.y >> 24)),
        column(static_cast<int>(words.z)),
        low_split(static_cast<int>(words.w & 0xFF)),
        low_splits(static_cast<int>(words.w >> 8)) {}
  __device__ uint4 words() const {
    return {static_cast<uint32_t>(tile), static_cast<uint32_t>(begin | end << 8 | split << 16 | splits << 24),
            static_cast<uint32_t>(column), static_cast<uint32_t>(low_split | low_splits << 8)};
  }
};

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

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

template <typename T, int kTokenTiles, bool kNested>
__global__ void __launch_bounds__(32 * kWarpsOf<kTokenTiles, kNested>, 1)
    encoder_kernel(const __grid_constant__ Arguments<T> a) {
  constexpr int tokens = 8 * kTokenTiles, kWarps = kWarpsOf<kTokenTiles, kNested>, kThreads = 32 * kWarps;
  constexpr int kUnit = kTokenTiles == 2 ? 3 : 2;  // as registers allow
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int row = lane >> 2, column = lane & 3;
  const int parts = gridDim.z, part = blockIdx.z;
  const int stride = kWarps * parts;  // from a tile of 16 rows of a weight to the next
  const Places places(a.width, a.hidden, a.rank, tokens);
  uint8_t* const shared = dynamic_shared();
  const uint32_t base = address_of_shared(shared);
  const int64_t first_window = static_cast<int64_t>(blockIdx.x) * a.windows_of_block;
  const int windows = static_cast<int>(min(a.windows - first_window, static_cast<int64_t>(a.windows_of_block)));
  const int rows_there = windows * a.tokens;
  const int64_t first_value = first_window * a.tokens * a.width;

  const int groups = kRoles * a.blocks;
  const auto in_features = [&](int role) { return role == kFc2 ? a.hidden : a.width; };
  const auto out_features = [&](int role) { return role == kFc1 ? a.hidden : a.width; };
  const auto tiles_of = [&](int role) { return out_features(role) / kRows * (role == kQkv ? 3 : 1); };
  const auto tiles_here = [&](int role) { return (tiles_of(role) - part + parts - 1) / parts; };
  const auto matrix_of = [&](int role, int tile) {
    return role == kQkv ? (tile * kRows >= a.width) + (tile * kRows >= 2 * a.width) : 0;
  };
  const auto layer_of = [&](int group, int matrix) -> const Layer& {
    const int role = group % kRoles;
    return a.layers[kLayers * (group / kRoles) + (role == kQkv ? matrix : role + 2)];
  };

  // What this warp does for each role; the divisions of it once.
  const int rank_tiles = (a.rank + 15) / 16;
  const auto plan_of = [&](int role) {
    Plan plan;
    const int steps = in_features(role) / kStep, here = tiles_here(role);
    const int most = is_roomy(tokens) ? max(1, min(steps, kWarps / here)) : 1, each = (steps + most - 1) / most;
    plan.splits = (steps + each - 1) / each;
    plan.split = warp % plan.splits;
    plan.tile = (warp / plan.splits) * parts + part;
    plan.begin = plan.split * each;
    plan.end = min(steps, plan.begin + each);
    // The last warps, which have fewer rows of the weight.
    const int columns = (role == kQkv ? 3 : 1) * 16 * rank_tiles, item = kWarps - 1 - warp;
    plan.low_splits = min(min(kLowSplits, steps), max(1, low_values(tokens) / (tokens * max(1, columns))));
    plan.low_split = item % plan.low_splits;
    plan.column = item < columns / 16 * plan.low_splits ? item / plan.low_splits * 16 : -1;
    return plan;
  };
  if (lane < kRoles) {
    *reinterpret_cast<uint4*>(shared + places.plans + 16 * (kRoles * warp + lane)) = plan_of(lane).words();
  }
  __syncwarp();
  const auto plan_at = [&](int role) {
    return Plan(load_shared_16(base + places.plans + 16 * (kRoles * warp + role)));
  };

  // The next unit that is read: of all layers, tile after tile of this warp.
  int next_group = -1, next_tile = 0, next_step = 0, next_begin = 0, next_end = 0;
  const auto skip = [&] {
    while (next_group < groups && (next_group < 0 || next_tile >= tiles_of(next_group % kRoles))) {
      const Plan plan = plan_at(++next_group % kRoles);
      next_tile = plan.tile;
      next_begin = next_step = plan.begin;
      next_end = plan.end;
    }
  };
  const auto read = [&](Unit<kUnit, kNested>& into) {
    if (next_group >= groups) return;
    const int role = next_group % kRoles, steps = in_features(role) / kStep;
    const int matrix = matrix_of(role, next_tile);
    const Layer& layer = layer_of(next_group, matrix);
    Unit<kUnit, kNested> fresh;  // of which only what is there is used
    const int there = next_end - next_step;
    if constexpr (kNested) fresh.offset = *layer.nested_offset;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int place = (next_tile * kRows - matrix * a.width + row + 8 * which) * steps + next_step;  // of 64 values
      const uint8_t* const codes = layer.packed + place * (kStep / 2) + 8 * column;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i < there) fresh.codes[i][which] = load_once(codes + i * (kStep / 2));
      }
      if (!kNested && a.shift == 6) {  // as most are: places that follow each other
        const float* const scales = static_cast<const float*>(layer.absmax) + place;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (i < there) fresh.scales[i][which] = scales[i];
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i >= there) break;
        const int block = (place + i) >> (a.shift - 6);
        if constexpr (kNested) {
          fresh.numbers[kNested ? i : 0][which] = static_cast<const uint8_t*>(layer.absmax)[block];
          fresh.scales[i][which] = layer.nested_absmax[block >> 8];
        } else {
          fresh.scales[i][which] = static_cast<const float*>(layer.absmax)[block];
        }
      }
    }
    into = fresh;
    next_step += kUnit;
    if (next_step >= next_end) {
      next_step = next_begin;
      next_tile += stride;
      skip();
    }
  };
  skip();
  Unit<kUnit, kNested> next = {};
  read(next);

  // Of a group what else comes from global memory and is needed first, asked for at the end of the one before: weight
  // and bias of the norm, a step of lora_A, four ranks in a row of each of two rows of lora_B, and the biases.
  uint32_t norm_words[2][kWidth / 64] = {};
  uint4 ahead_A[2][2] = {};
  uint2 ahead_B[2] = {};
  T biases[2] = {};
  const auto read_norm = [&](const Norm& norm) {
#pragma unroll
    for (int i = 0; i < kWidth / 64; ++i) {
      if (i >= a.width / 64) break;
      norm_words[0][i] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(norm.weight) + 64 * i + 2 * lane);
      norm_words[1][i] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(norm.bias) + 64 * i + 2 * lane);
    }
  };
  const auto read_A = [&](const Layer& layer, int first_rank, int width, int step, uint4 (&of_A)[2][2]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int of = first_rank + row + 8 * which;
      of_A[which][0] = of_A[which][1] = {};
      if (of >= a.rank) continue;
      const int64_t place = of * width + step * kStep + 16 * column;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        of_A[which][half] = a.wide ? eight<T, true>(layer.A, place + 8 * half)
                                   : eight<T, false>(layer.A, place + 8 * half);
      }
    }
  };
  const auto read_B = [&](const Layer& layer, int first_row, int chunk, uint2 (&of_B)[2]) {
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
  const auto read_of_tile = [&](int group, int tile) {
    const int matrix = matrix_of(group % kRoles, tile), first_row = tile * kRows - matrix * a.width;
    const Layer& layer = layer_of(group, matrix);
    if (a.rank) read_B(layer, first_row, 0, ahead_B);
    if (layer.bias) {
      biases[0] = static_cast<const T*>(layer.bias)[first_row + row];
      biases[1] = static_cast<const T*>(layer.bias)[first_row + row + 8];
    }
  };
  const auto read_ahead = [&](int group) {
    const int role = group % kRoles;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // what is not read is not kept, either
#pragma unroll
      for (uint32_t& word : norm_words[i]) word = 0;
      ahead_A[i][0] = ahead_A[i][1] = {};
      ahead_B[i] = {};
      biases[i] = rounded<T>(0.0f);
    }
    if (role == kQkv || role == kFc1) read_norm(a.norms[2 * (group / kRoles) + (role == kFc1)]);
    if (group >= groups) return;
    const Plan plan = plan_at(role);
    if (plan.column >= 0) {
      const int matrix = plan.column >= 16 * rank_tiles ? plan.column >= 32 * rank_tiles ? 2 : 1 : 0;
      read_A(layer_of(group, matrix), plan.column - 16 * rank_tiles * matrix, in_features(role), plan.low_split,
             ahead_A);
    }
    if (plan.tile < tiles_of(role)) read_of_tile(group, plan.tile);
  };
  read_ahead(0);

  // The table, the windows, and zeros for the rows after them.
  uint16_t* const values = reinterpret_cast<uint16_t*>(shared + places.values);
  float* const nested_code = reinterpret_cast<float*>(shared + places.nested_code);
  if (threadIdx.x < 16) values[threadIdx.x] = pattern(rounded<T>(a.code[threadIdx.x]));
  if (kNested && threadIdx.x < 256) nested_code[threadIdx.x] = a.nested_code[threadIdx.x];
  for (int i = threadIdx.x; i < tokens * (a.width / 8); i += kThreads) {
    const int token = i / (a.width / 8), place = i % (a.width / 8) * 8;
    uint4 eight_values = {};
    if (token < rows_there) {
      eight_values = *reinterpret_cast<const uint4*>(a.x + first_value + token * a.width + place);
    }
    *reinterpret_cast<uint4*>(shared + places.x + 2 * (token * places.pitch + place)) = eight_values;
  }
  if (parts > 1 && threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) arrivals_begin(base + places.arrivals + 8 * i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPairWords / 4; i += kThreads) {
    const uint32_t pair = pair_of(values, i / (kPairCopies / 4));
    reinterpret_cast<uint4*>(shared)[i] = {pair, pair, pair, pair};
  }
  if (parts == 1) {
    __syncthreads();
  } else {
    cluster_barrier();  // nobody writes into a block that has not begun
  }

  const auto word_at = [&](int place) { return *reinterpret_cast<const uint32_t*>(shared + place); };
  // LayerNorm of the rows of x from `begin`, every `every`th; put(row, word of two values, where).
  const auto norm_rows = [&](float eps, int begin, int every, int end, auto put) {
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
      const float mean = sum * a.of_width;
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
      const float inverse = rsqrtf(squares * a.of_width + eps);
#pragma unroll
      for (int i = 0; i < kWidth / 64; ++i) {
        if (i >= words) break;
        const float2 weight = unpacked(norm_words[0][i], T{}), bias = unpacked(norm_words[1][i], T{});
        put(token, 64 * i + 2 * lane,
            packed_pair(x[i].x * inverse * weight.x + bias.x, x[i].y * inverse * weight.y + bias.y, T{}));
      }
    }
  };

  // softmax(q·kᵀ / √size)·v, of 16 tokens, one head and one window at a time, to n: all in each block of threads, whose
  // warps are more than the heads, as a rule.
  const auto attend = [&] {
    const int size = a.width / a.heads, query_tiles = (a.tokens + 15) / 16, key_tiles = (a.tokens + 7) / 8;
    const float scale = rsqrtf(static_cast<float>(size)) * 1.44269504f;  // to the base of 2
    const int of_matrix = 2 * tokens * places.pitch;
    for (int task = warp; task < windows * a.heads * query_tiles; task += kWarps) {
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
        total[half] = __fdividef(1.0f, total[half]);
      }
      uint32_t weights[kTokenTiles / 2][4];
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; tile += 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&of)[4] = scores[tile + (i >> 1)];
          const int half = i & 1;
          weights[tile / 2][i] = packed_pair(of[2 * half] * total[half], of[2 * half + 1] * total[half], T{});
        }
      }
#pragma unroll
      for (int i = 0; i < kHead / 8; ++i) {
        if (8 * i >= size) break;
        float sums[4] = {};
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; tile += 2) {
          if (tile >= key_tiles) break;
          uint32_t of_v[2];
          load_transposed(of_v, base + place_of(2, 8 * tile + lane % 16, 8 * i));
          multiply_add<T>(sums, weights[tile / 2], of_v);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = queries + row + 8 * half;
          if (token >= a.tokens) continue;
          store_shared(base + places.n + 2 * ((begin + token) * places.pitch + head * size + 8 * i + 2 * column),
                       packed_pair(sums[2 * half], sums[2 * half + 1], T{}));
        }
      }
    }
  };

  // Of 64 rows of x shared memory has most to do: every second word of codes is decoded without.
  constexpr bool by_planes = kTokenTiles == 8;
  const Planes planes(values);
  const uint32_t copy = base + 4 * lane;
  // Of bytes 2 · product and the next of two words, as gemv::weight_operand; a product of bytes makes a place at once.
  const auto operand = [copy](uint32_t first, uint32_t second, int product, uint32_t (&weights)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t which = static_cast<uint32_t>(4 * kPairCopies) << 8 * (2 * product + i / 2);
      weights[i] = load_shared(__dp4a(i & 1 ? second : first, which, copy));
    }
  };
  for (int group = 0; group < groups; ++group) {
    const int role = group % kRoles, width = in_features(role), tiles = tiles_of(role);
    const uint32_t arrivals = base + places.arrivals + 8 * (group & 1);
    if (parts > 1 && threadIdx.x == 0) {
      arrivals_expect(arrivals, (tiles - tiles_here(role)) * kRows * tokens * static_cast<int>(sizeof(T)));
    }
    if (role == kQkv || role == kFc1) {
      norm_rows(a.norms[2 * (group / kRoles) + (role == kFc1)].eps, warp, kWarps, tokens,
                [&](int token, int place, uint32_t word) {
                  store_shared(base + places.n + 2 * (token * places.pitch + place), word);
                });
      __syncthreads();
    } else if (role == kO) {
      attend();
      __syncthreads();
    }
    const Plan plan = plan_at(role);
    const int in_pitch = role == kFc2 ? places.wide_pitch : places.pitch;
    const uint32_t in = base + (role == kFc2 ? places.wide : places.n) + 2 * (row * in_pitch + 16 * column);

    // t = x·lora_Aᵀ, for each 16 ranks and some of the steps; added up where it is read.
    const int columns = (role == kQkv ? 3 : 1) * 16 * rank_tiles, low_pitch = columns + kLowPad;
    float* const low = reinterpret_cast<float*>(shared + places.low);
    int first_column = plan.column, low_split = plan.low_split;
    for (int item = kWarps - 1 - warp; first_column >= 0;) {
      const int matrix = first_column >= 16 * rank_tiles ? first_column >= 32 * rank_tiles ? 2 : 1 : 0;
      const int first_rank = first_column - 16 * rank_tiles * matrix, steps = width / kStep;
      const Layer& layer = layer_of(group, matrix);
      float sums[kTokenTiles][4] = {};
#pragma unroll 1
      for (int step = low_split; step < steps;) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 x = load_shared_16(in + 2 * (8 * tile * in_pitch + step * kStep + 8 * half));
            const uint4 &r0 = ahead_A[0][half], &r1 = ahead_A[1][half];
            multiply_add<T>(sums[tile], {r0.x, r1.x, r0.y, r1.y}, {x.x, x.y});
            multiply_add<T>(sums[tile], {r0.z, r1.z, r0.w, r1.w}, {x.z, x.w});
          }
        }
        step += plan.low_splits;
        if (step < steps) read_A(layer, first_rank, width, step, ahead_A);
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * tile + 2 * column + (i & 1);
          low[(low_split * tokens + token) * low_pitch + first_column + row + 8 * (i >> 1)] = sums[tile][i];
        }
      }
      item += kWarps;
      if (item >= columns / 16 * plan.low_splits) break;
      low_split = item % plan.low_splits;
      first_column = item / plan.low_splits * 16;
      const int next_matrix = first_column / (16 * rank_tiles);
      read_A(layer_of(group, next_matrix), first_column - 16 * rank_tiles * next_matrix, width, low_split, ahead_A);
    }

    for (int tile = plan.tile; tile < tiles || tile == plan.tile; tile += stride) {
      const bool there = tile < tiles;
      const int matrix = matrix_of(role, tile), first_row = tile * kRows - matrix * a.width;
      const Layer& layer = layer_of(group, matrix);
      if (tile != plan.tile) read_of_tile(group, tile);  // needed last and asked for first
      float total[kTokenTiles][4] = {};
      for (int unit = plan.begin; unit < plan.end && there; unit += kUnit) {
        const Unit<kUnit, kNested> now = next;
        read(next);
        uint32_t from[kTokenTiles];
#pragma unroll
        for (int of = 0; of < kTokenTiles; ++of) from[of] = in + 2 * (8 * of * in_pitch + unit * kStep);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (unit + i >= plan.end) break;
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
                operand(codes[0][half], codes[1][half], product, weights[product]);
              }
            }
#pragma unroll
            for (int of = 0; of < kTokenTiles; ++of) {
              const uint4 x = load_shared_16(from[of] + 2 * (i * kStep + 8 * half));
              multiply_add<T>(sums[of], weights[0], {x.x, x.y});
              multiply_add<T>(sums[of], weights[1], {x.z, x.w});
            }
          }
          const auto scale = [&](int which) {
            if constexpr (!kNested) return now.scales[i][which];
            return nested_scale(nested_code[now.numbers[kNested ? i : 0][which]], now.scales[i][which], now.offset);
          };
          const float scales[2] = {scale(0), scale(1)};
#pragma unroll
          for (int of = 0; of < kTokenTiles; ++of) gemv::add_scaled(total[of], sums[of], scales[0], scales[1]);
        }
      }
      const int splits = is_roomy(tokens) ? plan.splits : 1;
      const auto sums_at = [&](int of_warp, int of) -> float4& {
        return reinterpret_cast<float4*>(shared + places.sums)[32 * (kTokenTiles * of_warp + of) + lane];
      };
      if (splits > 1) {
#pragma unroll
        for (int of = 0; of < kTokenTiles; ++of) {
          sums_at(warp, of) = {total[of][0], total[of][1], total[of][2], total[of][3]};
        }
      }
      if (tile == plan.tile && (a.rank || splits > 1)) __syncthreads();  // t is there, and the other warps' sums
      if (!there) continue;

      // Of several warps for a tile each ends some of its tokens.
      const auto is_mine = [&](int of) { return splits == 1 || of % splits == plan.split; };
      if (splits > 1) {
#pragma unroll
        for (int of = 0; of < kTokenTiles; ++of) {
          if (!is_mine(of)) continue;
          float4 sum = sums_at(warp - plan.split, of);
#pragma unroll 4
          for (int split = 1; split < splits; ++split) {
            const float4 more = sums_at(warp - plan.split + split, of);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
          }
          total[of][0] = sum.x, total[of][1] = sum.y, total[of][2] = sum.z, total[of][3] = sum.w;
        }
      }
#pragma unroll 1
      for (int chunk = 0; chunk < rank_tiles; ++chunk) {
        if (chunk) read_B(layer, first_row, chunk, ahead_B);
        const uint32_t weights[4] = {ahead_B[0].x, ahead_B[1].x, ahead_B[0].y, ahead_B[1].y};
#pragma unroll
        for (int of = 0; of < kTokenTiles; ++of) {
          if (!is_mine(of)) continue;
          const float* const from = low + (8 * of + row) * low_pitch + 16 * (matrix * rank_tiles + chunk) + 4 * column;
          float4 t = *reinterpret_cast<const float4*>(from);
#pragma unroll
          for (int split = 1; split < kLowSplits; ++split) {
            if (split >= plan.low_splits) break;
            const float4 more = *reinterpret_cast<const float4*>(from + split * tokens * low_pitch);
            t.x += more.x, t.y += more.y, t.z += more.z, t.w += more.w;
          }
          float adapter[4] = {};
          multiply_add<T>(adapter, weights, {packed_pair(t.x, t.y, T{}), packed_pair(t.z, t.w, T{})});
          gemv::add_scaled(total[of], adapter, layer.scaling, layer.scaling);
        }
      }
      // Where a token's values of this layer lie: the first, and from a token to the next.
      const int to_pitch = role == kFc1 ? places.wide_pitch : places.pitch;
      const int to = (role == kQkv || role == kFc1 ? places.wide : places.x) +
                     2 * (matrix * tokens * places.pitch + first_row);
#pragma unroll
      for (int of = 0; of < kTokenTiles; ++of) {
        if (!is_mine(of)) continue;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const auto y = [&](int i) { return total[of][2 * which + i] + static_cast<float>(biases[which]); };
          // Two tokens of a row become two rows of a token.
          uint32_t word = transposed(packed_pair(y(0), y(1), T{}));
          const int place = to + 2 * ((8 * of + row) * to_pitch + 8 * which + 2 * column);
          if (role == kFc1) {
            const float2 h = unpacked(word, T{});
            word = packed_pair(gelu(h.x), gelu(h.y), T{});
          } else if (role != kQkv) {
            const float2 more = unpacked(word, T{}), x = unpacked(word_at(place), T{});
            word = packed_pair(x.x + more.x, x.y + more.y, T{});
          }
          store_shared(base + place, word);
        }
      }
      if (parts > 1) {  // to the others, 16 bytes at a time
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 2 * tokens; i += 32) {
          if (!is_mine(i / 16)) continue;
          const uint32_t place = base + to + 2 * (i / 2 * to_pitch + i % 2 * 8);
          const uint4 words = load_shared_16(place);
#pragma unroll 1
          for (int other = 1; other < parts; ++other) {
            const uint32_t block = (part + other) & (parts - 1);
            store_async(shared_of(block, place), words, shared_of(block, arrivals));
          }
        }
      }
    }
    __syncthreads();
    read_ahead(group + 1);  // while the others' rows are on their way
    if (parts > 1) arrivals_wait(arrivals, group / 2 & 1);
  }

  if (a.ends) {
    norm_rows(a.norms[2 * a.blocks].eps, warp * parts + part, stride, rows_there,
              [&](int token, int place, uint32_t word) {
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

// The kernel for such arguments, and how it is launched.
template <typename T>
struct Chosen {
  void (*kernel)(Arguments<T>);
  Launch launch;
};

template <typename T, int kTokenTiles>
Chosen<T> chosen(bool nested, int width, int hidden, int rank, int64_t groups, int parts) {
  return {nested ? encoder_kernel<T, kTokenTiles, true> : encoder_kernel<T, kTokenTiles, false>,
          {.grid = dim3(static_cast<unsigned>(groups), 1, static_cast<unsigned>(parts)),
           .threads = 32u * (nested ? kWarpsOf<kTokenTiles, true> : kWarpsOf<kTokenTiles, false>),
           .stream = nullptr,
           .dynamic_bytes = static_cast<size_t>(Places(width, hidden, rank, 8 * kTokenTiles).bytes),
           .cluster = parts > 1}};
}

template <typename T>
Chosen<T> chosen(int64_t token_tiles, bool nested, int width, int hidden, int rank, int64_t groups, int64_t parts) {
  while (parts > std::min(width, hidden) / kRows) parts /= 2;  // each block of threads has rows of every weight
  const auto of = token_tiles == 2 ? chosen<T, 2> : token_tiles == 4 ? chosen<T, 4> : chosen<T, 8>;
  return of(nested, width, hidden, rank, groups, static_cast<int>(parts));
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
  a.of_width = 1.0f / static_cast<float>(width);
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
  auto [kernel, launch] = chosen<T>(token_tiles, nested_code != nullptr, a.width, a.hidden, a.rank,
                                    (a.windows + a.windows_of_block - 1) / a.windows_of_block, parts);
  STD_TORCH_CHECK(!launch.cluster || waits_for_previous(kName, kernel), kName,
                  ": parts must be 1 where the kernel is made of older PTX");
  launch.stream = stream;
  for (int64_t begin = 0; begin < blocks; begin += kMostBlocks) {
    a.blocks = static_cast<int>(std::min<int64_t>(kMostBlocks, blocks - begin));
    a.ends = begin + a.blocks == blocks;
    std::copy_n(layers.data() + kLayers * begin, kLayers * a.blocks, a.layers);
    std::copy_n(norms.data() + 2 * begin, 2 * a.blocks + 1, a.norms);
    launch_kernel(kName, kernel, launch, a);
    a.x = a.y;  // each block of threads reads its windows before it writes them
  }
}

}  // namespace whole

int64_t encoder_shared_bytes(int64_t width, int64_t hidden, int64_t rank, int64_t token_tiles) {
  return whole::Places(static_cast<int>(width), static_cast<int>(hidden), static_cast<int>(rank),
                       static_cast<int>(8 * token_tiles))
      .bytes;
}

int64_t encoder_room(int64_t width, int64_t hidden, int64_t rank, bool nested, int64_t token_tiles, int64_t parts) {
  const auto [kernel, launch] = whole::chosen<__nv_bfloat16>(token_tiles, nested, static_cast<int>(width),
                                                             static_cast<int>(hidden), static_cast<int>(rank), 1, parts);
  return parts > 1 && !waits_for_previous(whole::kName, kernel) ? 0 : most_at_once(whole::kName, kernel, launch);
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
