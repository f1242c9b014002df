#pragma once

// 16-bit numbers by their bits.

#include <cstdint>
#include <cstring>

inline float value_of(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint16_t half_of(uint32_t word, int which) { return static_cast<uint16_t>(word >> (16 * which)); }
