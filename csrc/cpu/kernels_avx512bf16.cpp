// The kernels for AVX-512 (F, BW, DQ, VL, BF16); setup.py gives the flags.

#include "kernels.h"

#include <immintrin.h>
#define HARLORA_AVX512
#define HARLORA_BF16

namespace harlora::cpu {
namespace {
#include "scalar.h"
#include "simd.h"
#include "kernels.inl"
}  // namespace

extern const Kernels avx512bf16_kernels = make_kernels("avx512bf16");

}  // namespace harlora::cpu
