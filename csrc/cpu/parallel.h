#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace harlora::cpu {

// The kernels that serve: the best that this processor has, or those that HARLORA_CPU names.
const Kernels& kernels();

// Whether this processor and those kernels have products of such factors.
bool has(const Kernels& k, Precision precision);

// False in a process that was forked: the threads of OpenMP do not survive a fork, and waiting for them never ends.
bool threads_usable();

// Multiply-adds for which another thread is worth waking.
constexpr int64_t kWorkOfThread = 150'000;

// As many of torch's threads as `work` (multiply-adds) keeps busy.
inline int64_t parts_of(int64_t work) {
  if (work < 2 * kWorkOfThread || !threads_usable()) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / kWorkOfThread);
}

// f(part, parts) for every part, on parts_of(work) threads.
template <typename F>
void in_parts(int64_t work, const F& f) {
  const int64_t parts = parts_of(work);
  if (parts == 1) return f(int64_t{0}, int64_t{1});
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) f(part, parts);
  });
}

// The first of `count` items, in multiples of `step`, that belongs to `part`.
inline int64_t share(int64_t count, int64_t part, int64_t parts, int64_t step = 1) {
  const int64_t steps = (count + step - 1) / step;
  return std::min(count, steps * part / parts * step);
}

}  // namespace harlora::cpu
