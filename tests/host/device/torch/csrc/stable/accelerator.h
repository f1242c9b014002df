#pragma once

// There is one device in the model, and it is the current one.
#define DeviceGuard DeviceGuardOfTorch
#include_next <torch/csrc/stable/accelerator.h>
#undef DeviceGuard

namespace torch::stable::accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace torch::stable::accelerator
