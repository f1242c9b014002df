// The kernels for AVX2, FMA and F16C; setup.py gives the flags.

#include "kernels.h"

#include <immintrin.h>
#define HARLORA_AVX2

namespace harlora::cpu {
namespace {
#include "scalar.h"
#include "simd.h"
#include "kernels.inl"
}  // namespace

extern const Kernels avx2_kernels = make_kernels("avx2");

}  // namespace harlora::cpu
