// Dropped values of an adapter's input; kernels/dropout.py says which they are.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"
#include "operators.h"
#include "parallel.h"

namespace harlora::cpu {
namespace {

#include "scalar.h"

constexpr int kRounds = 7;
constexpr int64_t kGroup = 8;   // values for which one counter has halves of words
constexpr int64_t kLanes = 16;  // counters at a time, in loops that compilers turn into vectors
constexpr int64_t kWork = 64;   // multiply-adds that take as long as one value

// All bits for the values of 16 groups of a row that are kept, none for the others.
void keep(uint64_t seed, uint32_t row, uint32_t group, uint32_t limit, uint32_t* kept) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    c0[i] = row;
    c1[i] = group + static_cast<uint32_t>(i);
    c2[i] = c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t first = uint64_t{c0[i]} * 0xD2511F53u, second = uint64_t{c2[i]} * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(second);
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(first);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int j = 0; j < 4; ++j) {
      kept[kGroup * i + 2 * j] = (words[j] & 0xFFFF) >= limit ? ~uint32_t{0} : 0;
      kept[kGroup * i + 2 * j + 1] = words[j] >> 16 >= limit ? ~uint32_t{0} : 0;
    }
  }
}

inline float rounded(float value, float) { return value; }
inline BFloat16 rounded(float value, BFloat16) { return to_bfloat16(value); }
inline Half rounded(float value, Half) { return to_half(value); }
inline float to_float(float value) { return value; }

template <typename T>
void drop(const T* x, int64_t columns, uint64_t seed, uint32_t limit, int64_t first_row, int64_t last_row, T* out) {
  const float rescale = 65536.0f / (65536.0f - static_cast<float>(limit));
  uint32_t kept[kGroup * kLanes];
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t column = 0; column < columns; column += kGroup * kLanes) {
      keep(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(column / kGroup), limit, kept);
      const int64_t n = std::min(kGroup * kLanes, columns - column);
      const T* from = x + row * columns + column;
      T* to = out + row * columns + column;
      for (int64_t i = 0; i < n; ++i) {
        // By bits, also of NaN: branches on random numbers are mispredicted.
        to[i] = rounded(from_bits(to_bits(to_float(from[i]) * rescale) & kept[i]), T{});
      }
    }
  }
}

}  // namespace

void dropout(Tensor x, Tensor seed, int64_t limit, Tensor out) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == x.size(1),
                  "x and out must have one shape (rows, columns)");
  STD_TORCH_CHECK(x.is_cpu() && out.is_cpu() && out.scalar_type() == type, "x and out must be alike, on the CPU");
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "x and out must be contiguous");
  STD_TORCH_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "seed must be one int64 on the CPU");
  STD_TORCH_CHECK(limit >= 0 && limit < 65536, "limit must be below 65536, got ", limit);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const int64_t rows = x.size(0), columns = x.size(1);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const auto share_out = [&]<typename T>(T) {
    in_parts(kWork * rows * columns, [&](int64_t part, int64_t parts) {
      drop(static_cast<const T*>(from), columns, key, static_cast<uint32_t>(limit), share(rows, part, parts),
           share(rows, part + 1, parts), static_cast<T*>(to));
    });
  };
  switch (type) {
    case ScalarType::Float: return share_out(float{});
    case ScalarType::BFloat16: return share_out(BFloat16{});
    case ScalarType::Half: return share_out(Half{});
    default: STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
}

}  // namespace harlora::cpu
