// The kernels for AVX-512 (F, BW, DQ, VL); setup.py gives the flags.

#include "kernels.h"

#include <immintrin.h>
#define HARLORA_AVX512

namespace harlora::cpu {
namespace {
#include "scalar.h"
#include "simd.h"
#include "kernels.inl"
}  // namespace

extern const Kernels avx512_kernels = make_kernels("avx512");

}  // namespace harlora::cpu
