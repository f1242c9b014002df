// Vectors of float32 for the instruction set that the including file is compiled for.
//
// Included inside the namespace of one variant (kernels_*.cpp), so that no inline function of one instruction set can
// be linked into another. No C++ library function may be used in variant code for the same reason: its out-of-line
// copies are shared between variants.
//
//   F      LANES float32            I      LANES int32
//   LANES  16 (AVX-512) or 8: always whole groups of eight, on which `transpose8` and the GEMV kernel work
//   ROWS   rows of accumulators of the GEMM tile, by the number of vector registers

#if defined(HARLORA_AVX512)

constexpr int LANES = 16, ROWS = 14;
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }
inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I shift_left(I v, int bits) { return _mm512_slli_epi32(v, static_cast<unsigned>(bits)); }
inline I shift_right(I v, int bits) { return _mm512_srli_epi32(v, static_cast<unsigned>(bits)); }

// The 16 values of a code table in registers; `lookup` takes the low four bits of each lane.
struct Table {
  F values;
};
inline Table load_table(const float* p) { return {load(p)}; }
inline F lookup(const Table& table, I index) { return _mm512_permutexvar_ps(index, table.values); }

// Eight floats (eight int32) of one row in lanes 0-7, of another in lanes 8-15.
inline F load_rows(const float* a, const float* b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
inline I load_rows(const uint8_t* a, const uint8_t* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
}
inline F set_rows(float a, float b) { return _mm512_mask_broadcastss_ps(set(a), 0xFF00, _mm_set_ss(b)); }
inline F load_repeated(const float* p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
inline void store_eight(float* p, F v) { _mm256_storeu_ps(p, _mm512_castps512_ps256(v)); }
inline I bytes(const uint8_t* p) {  // one byte a lane
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void interleave(F even, F odd, F* first, F* second) {
  const I a = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const I b = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  *first = _mm512_permutex2var_ps(even, a, odd);
  *second = _mm512_permutex2var_ps(even, b, odd);
}
inline F gather(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }

#define HARLORA_I2F(v) _mm512_castsi512_ps(v)
#define HARLORA_F2I(v) _mm512_castps_si512(v)
inline F unpack_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
inline F unpack_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
template <int mask>
inline F shuffle(F a, F b) { return _mm512_shuffle_ps(a, b, mask); }
// Of each group of eight lanes the low (high) four, of a then of b.
inline F low_fours(F a, F b) {
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(27, 26, 25, 24, 11, 10, 9, 8, 19, 18, 17, 16, 3, 2, 1, 0), b);
}
inline F high_fours(F a, F b) {
  return _mm512_permutex2var_ps(a, _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 23, 22, 21, 20, 7, 6, 5, 4), b);
}

inline F load(const BFloat16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void store(BFloat16* p, F v) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(Half* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#if defined(HARLORA_BF16)
// Of each lane: sum + a₀·b₀ + a₁·b₁, a and b pairs of bfloat16.
inline F dot_pairs(I a, I b, F sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
inline I set_pair(const BFloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
// Of the low five bits of each half lane, the value of a table of 32.
inline I lookup_halves(I table, I index) { return _mm512_permutexvar_epi16(index, table); }
inline I shift_right_halves(I v, int bits) { return _mm512_srli_epi16(v, static_cast<unsigned>(bits)); }
// Byte `byte` of each lane, its high four bits in the lower half of the lane; above four bits stands anything.
template <int byte>
inline I halves_of_byte(I v) {
  const I copies = _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_set_epi8(
      byte + 12, byte + 12, byte + 12, byte + 12, byte + 8, byte + 8, byte + 8, byte + 8, byte + 4, byte + 4, byte + 4,
      byte + 4, byte, byte, byte, byte)));
  return _mm512_srlv_epi16(copies, _mm512_set1_epi32(4));
}
#endif


// Products of bytes, of processors that have them beyond the instruction set of the file.
#define HARLORA_BYTES __attribute__((target("avx512vnni")))
// Of each lane: sum + the four products of unsigned bytes of a with signed ones of b.
HARLORA_BYTES inline I dot_bytes(I a, I b, I sum) { return _mm512_dpbusd_epi32(sum, a, b); }
inline I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, I v) { _mm512_storeu_si512(p, v); }
inline I set(int32_t v) { return _mm512_set1_epi32(v); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
inline I maximum(I a, I b) { return _mm512_max_epi32(a, b); }
inline int32_t largest_of(I v) { return _mm512_reduce_max_epi32(v); }
// The bytes of a table of 16, repeated in each 128 bits, that the low four bits of each byte point to.
inline I lookup_bytes(I table, I index) { return _mm512_shuffle_epi8(table, index); }
// To nearest, 128 higher, the even before the odd ones of each eight.
inline void store_above_128(uint8_t* p, F v) {
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  const __m128i values = _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(values, _mm_set1_epi8(-128)));
}

#elif defined(HARLORA_AVX2)

constexpr int LANES = 8, ROWS = 6;
using F = __m256;
using I = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F set(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }
inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I shift_left(I v, int bits) { return _mm256_slli_epi32(v, bits); }
inline I shift_right(I v, int bits) { return _mm256_srli_epi32(v, bits); }

// A permutation takes the low three bits of its index; the fourth chooses between the halves of the table.
struct Table {
  F low, high;
};
inline Table load_table(const float* p) { return {load(p), load(p + 8)}; }
inline F lookup(const Table& table, I index) {
  const F choose = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          choose);
}

inline F load_rows(const float* a, const float*) { return load(a); }
inline I load_rows(const uint8_t* a, const uint8_t*) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
}
inline F set_rows(float a, float) { return set(a); }
inline F load_repeated(const float* p) { return load(p); }
inline void store_eight(float* p, F v) { store(p, v); }
inline I bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void interleave(F even, F odd, F* first, F* second) {
  const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  *first = _mm256_permute2f128_ps(low, high, 0x20);
  *second = _mm256_permute2f128_ps(low, high, 0x31);
}
inline F gather(const float* table, I index) { return _mm256_i32gather_ps(table, index, 4); }

#define HARLORA_I2F(v) _mm256_castsi256_ps(v)
#define HARLORA_F2I(v) _mm256_castps_si256(v)
inline F unpack_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
inline F unpack_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
template <int mask>
inline F shuffle(F a, F b) { return _mm256_shuffle_ps(a, b, mask); }
inline F low_fours(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x20); }
inline F high_fours(F a, F b) { return _mm256_permute2f128_ps(a, b, 0x31); }

inline F load(const BFloat16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void store(BFloat16* p, F v) {
  const I bits = _mm256_castps_si256(v);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0),
                               _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
inline F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(Half* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}


#if __GNUC__ >= 11 || __clang_major__ >= 12
#define HARLORA_BYTES __attribute__((target("avxvnni")))
HARLORA_BYTES inline I dot_bytes(I a, I b, I sum) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
inline I load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline I set(int32_t v) { return _mm256_set1_epi32(v); }
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
inline I both(I a, I b) { return _mm256_and_si256(a, b); }
inline I maximum(I a, I b) { return _mm256_max_epi32(a, b); }
inline int32_t largest_of(I v) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
inline I lookup_bytes(I table, I index) { return _mm256_shuffle_epi8(table, index); }
inline void store_above_128(uint8_t* p, F v) {
  const I whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i order = _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 7, 5, 3, 1, 6, 4, 2, 0);
  const __m128i values = _mm_shuffle_epi8(_mm_packs_epi16(words, words), order);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_xor_si128(values, _mm_set1_epi8(-128)));
}
#endif

#else  // portable: GCC's and clang's vector extension, which every target lowers to what it has

constexpr int LANES = 8, ROWS = 4;
typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

inline F set(float v) { return F{v, v, v, v, v, v, v, v}; }
inline F zero() { return set(0.0f); }
inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
  F r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
inline F sub(F a, F b) { return a - b; }
inline F div(F a, F b) { return a / b; }
inline F minimum(F a, F b) { return a < b ? a : b; }
inline F maximum(F a, F b) { return a > b ? a : b; }
inline I add(I a, I b) { return a + b; }
inline I shift_left(I v, int bits) {
  typedef uint32_t U __attribute__((vector_size(32)));
  return reinterpret_cast<I>(reinterpret_cast<U>(v) << static_cast<uint32_t>(bits));
}
inline I shift_right(I v, int bits) {
  typedef uint32_t U __attribute__((vector_size(32)));
  return reinterpret_cast<I>(reinterpret_cast<U>(v) >> static_cast<uint32_t>(bits));
}

struct Table {
  const float* values;
};
inline Table load_table(const float* p) { return {p}; }
inline F lookup(const Table& table, I index) {
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = table.values[index[i] & 15];
  return v;
}

inline F load_rows(const float* a, const float*) { return load(a); }
inline I load_rows(const uint8_t* a, const uint8_t*) {
  I v;
  __builtin_memcpy(&v, a, sizeof v);
  return v;
}
inline F set_rows(float a, float) { return set(a); }
inline F load_repeated(const float* p) { return load(p); }
inline void store_eight(float* p, F v) { store(p, v); }
inline I bytes(const uint8_t* p) { return I{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
// Lanes of a and then of b, by number. GCC has clang's builtin since version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define HARLORA_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HARLORA_LANES(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
inline void interleave(F even, F odd, F* first, F* second) {
  *first = HARLORA_LANES(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
  *second = HARLORA_LANES(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline F gather(const float* table, I index) {
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = table[index[i]];
  return v;
}

#define HARLORA_I2F(v) reinterpret_cast<F>(v)
#define HARLORA_F2I(v) reinterpret_cast<I>(v)
inline F unpack_low(F a, F b) { return HARLORA_LANES(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
inline F unpack_high(F a, F b) { return HARLORA_LANES(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
template <int mask>
inline F shuffle(F a, F b) {
  constexpr int i = mask & 3, j = mask >> 2 & 3, k = mask >> 4 & 3, l = mask >> 6 & 3;
  return HARLORA_LANES(a, b, i, j, 8 + k, 8 + l, 4 + i, 4 + j, 12 + k, 12 + l);
}
inline F low_fours(F a, F b) { return HARLORA_LANES(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
inline F high_fours(F a, F b) { return HARLORA_LANES(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }

inline F load(const BFloat16* p) {
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(BFloat16* p, F v) {
  for (int i = 0; i < LANES; ++i) p[i] = to_bfloat16(v[i]);
}
inline F load(const Half* p) {
  F v;
  for (int i = 0; i < LANES; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(Half* p, F v) {
  for (int i = 0; i < LANES; ++i) p[i] = to_half(v[i]);
}

#endif

// Within each group of eight lanes: lane i of v[j] becomes lane j of v[i].
inline void transpose8(I v[8]) {
  F a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = unpack_low(HARLORA_I2F(v[i]), HARLORA_I2F(v[i + 1]));
    a[i + 1] = unpack_high(HARLORA_I2F(v[i]), HARLORA_I2F(v[i + 1]));
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = shuffle<0x44>(a[i], a[i + 2]);
    b[i + 1] = shuffle<0xEE>(a[i], a[i + 2]);
    b[i + 2] = shuffle<0x44>(a[i + 1], a[i + 3]);
    b[i + 3] = shuffle<0xEE>(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = HARLORA_F2I(low_fours(b[i], b[i + 4]));
    v[i + 4] = HARLORA_F2I(high_fours(b[i], b[i + 4]));
  }
}

// sums[LANES / 8 * i + group] = the sum of the eight lanes of that group in v[i].
inline void sum_groups(const F v[4], float* sums) {
  const F a = add(unpack_low(v[0], v[1]), unpack_high(v[0], v[1]));
  const F b = add(unpack_low(v[2], v[3]), unpack_high(v[2], v[3]));
  const F fours = add(shuffle<0x44>(a, b), shuffle<0xEE>(a, b));
  float all[LANES];
  store(all, add(low_fours(fours, fours), high_fours(fours, fours)));
  for (int i = 0; i < 4; ++i) {
    for (int group = 0; group < LANES / 8; ++group) sums[LANES / 8 * i + group] = all[8 * group + i];
  }
}
