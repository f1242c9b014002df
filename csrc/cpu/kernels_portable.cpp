// The kernels for any processor; setup.py gives the flags.

#include "kernels.h"

#define HARLORA_PORTABLE

namespace harlora::cpu {
namespace {
#include "scalar.h"
#include "simd.h"
#include "kernels.inl"
}  // namespace

extern const Kernels portable_kernels = make_kernels("portable");

}  // namespace harlora::cpu
