// Conversions of one value, rounding to nearest even. Included inside the namespace of each variant, as simd.h is.

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
inline BFloat16 to_bfloat16(float v) {
  const uint32_t bits = to_bits(v);
  if (v != v) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7FFF;
  if (rest >= 0x7C00) return from_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // As a float32 exponent the value is 2^112 too small; the product also makes subnormal numbers normal.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
inline Half to_half(float v) {
  const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (rest >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and above round to infinity
  if (rest < 0x38800000) {  // subnormal: adding 0.5 aligns the last bit of the sum with that of the result
    return {static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3F000000))};
  }
  return {static_cast<uint16_t>(sign | (rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13)};
}
