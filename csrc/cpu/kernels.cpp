// Which instruction set serves, and whether threads may be used.

#include "kernels.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "operators.h"
#include "parallel.h"

#ifdef HARLORA_X86
#include <cpuid.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace harlora::cpu {
namespace {

std::atomic<bool> forked{false};
std::atomic<const Kernels*> selected{nullptr};

bool runs(const Kernels& candidate) {
#ifdef HARLORA_X86
  __builtin_cpu_init();
  if (&candidate == &avx512bf16_kernels) return runs(avx512_kernels) && __builtin_cpu_supports("avx512bf16");
  if (&candidate == &avx512_kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (&candidate == &avx2_kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return &candidate == &portable_kernels;
}

// Products of bytes: in AVX-512, or in vectors of AVX2.
bool has_vnni(bool wide) {
#ifdef HARLORA_X86
  if (wide) return __builtin_cpu_supports("avx512vnni");
  unsigned a = 0, b = 0, c = 0, d = 0;  // compilers do not agree on a name for this one
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#else
  (void)wide;
  return false;
#endif
}

bool is_amd() {
#ifdef HARLORA_X86
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Best first.
constexpr const Kernels* all_kernels[] = {
#ifdef HARLORA_X86
    &avx512bf16_kernels,
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

// The kernels of that name, or the best. Every way to use kernels begins here, so forks are watched from here on.
const Kernels* find(const std::string& name) {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
#endif
  std::string known;
  for (const Kernels* candidate : all_kernels) {
    if (!runs(*candidate)) continue;
    // Products of bfloat16 pairs run at twice the rate of float32 on a Zen 5, at half of it on a Xeon (both measured).
    const bool slow = candidate->pairs && !is_amd();
    if (name == candidate->name || (name.empty() && !slow)) return candidate;
    known += std::string(known.empty() ? "" : ", ") + candidate->name;
  }
  STD_TORCH_CHECK(false, "HARLORA_CPU must be one of the kernels that this processor runs (", known, "), got '", name,
                  "'; unset it for the best");
}

}  // namespace

const Kernels& kernels() {
  const Kernels* found = selected.load(std::memory_order_relaxed);
  if (found == nullptr) {
    const char* wanted = std::getenv("HARLORA_CPU");
    found = find(wanted == nullptr ? "" : wanted);
    selected = found;
  }
  return *found;
}

bool has(const Kernels& k, Precision precision) {
  if (precision == Precision::bfloat16) return k.pairs;
  if (precision == Precision::float32) return true;
#ifdef HARLORA_X86
  static const bool wide = has_vnni(true), narrow = has_vnni(false);
  return k.round_to_bytes != nullptr && (&k == &avx2_kernels ? narrow : wide);
#else
  return false;
#endif
}

bool threads_usable() { return !forked.load(std::memory_order_relaxed); }

std::string precisions() {
  std::string names = "float32";
  if (has(kernels(), Precision::bfloat16)) names += " bfloat16";
  if (has(kernels(), Precision::int8)) names += " int8";
  return names;
}

std::string select_kernels(std::string name) {
  selected = find(name);
  return selected.load()->name;
}

}  // namespace harlora::cpu
