// The arithmetic of all operators, in terms of the vectors of simd.h. Included by kernels_*.cpp, once for each
// instruction set, inside an anonymous namespace.
//
// One GEMM serves all products. `tile` multiplies a few rows of `a`, broadcast value by value, with a panel of `b`: a
// strip of PANEL columns, step by step along the reduced dimension. Panels of the weight are decoded just before they
// are used and never outlive job.depth steps: at most 64 KiB for a thread, less where there are many.
//
//   forward   y  = x · Ŵᵀ     panel: PANEL rows of Ŵ, transposed on the packed bytes, eight codes at a time
//   backward  dX = dY · Ŵ     panel: PANEL columns of Ŵ, rows as they lie; even columns first, odd ones after
//             dA = uᵀ · x     panel: PANEL columns of x
//             dB = dYᵀ · t    panel: PANEL columns of dY; the transpose of dB is computed
//
// The low-rank branch is `rank` further steps into the same accumulators. For few rows decoding would cost more than
// the product: `forward_few` multiplies codes in registers as they come and scales sums of 64. In bfloat16 and in 8 bits
// a panel holds codes, not weights, and sums of 64 are scaled too.

constexpr int PANEL = 2 * LANES;
// Steps of a decoded panel at most. Loops over them run once even where there are none, to write the zeros.
constexpr int64_t DEPTH = 512;
constexpr int GRANULE = 64;        // codes of a row decoded at a time: 32 bytes
constexpr int LINE = 2 * GRANULE;  // of a row in one line of the cache: used while it is there
constexpr int64_t ROW_BLOCK = 16 * ROWS;
constexpr int RANKS = 64;       // ranks of one pass; larger adapters take several

constexpr int FEW = LANES == 16 ? 8 : 4;  // rows whose codes are multiplied in registers; 2 of narrower types
constexpr int GROUP = LANES / 8;          // groups of eight lanes, which hold what shares a scale
constexpr int64_t FEW_VALUES = 32768;     // of such rows at most: their reordered copy is on the stack

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
inline float one(const T* p) {
  return to_float(*p);
}
inline float one(const float* p) { return *p; }
inline void put(float* p, float v) { *p = v; }
inline void put(BFloat16* p, float v) { *p = to_bfloat16(v); }
inline void put(Half* p, float v) { *p = to_half(v); }

// Rows and columns into float32 -------------------------------------------------------------------------------------

// to[i] = from[i] for i < n, zeros up to `width`, a multiple of LANES.
template <typename T>
inline void widen(const T* from, int64_t n, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = one(from + i);
  for (; i < width; ++i) to[i] = 0.0f;
}

template <typename T>
inline void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; ++i) put(to + i, from[i]);
}

void narrow_to(const float* from, int64_t n, Dtype dtype, void* to) {
  if (dtype == Dtype::float32) return narrow(from, n, static_cast<float*>(to));
  if (dtype == Dtype::bfloat16) return narrow(from, n, static_cast<BFloat16*>(to));
  return narrow(from, n, static_cast<Half*>(to));
}

// Eight values of one row in the first eight lanes, of another in the others, if there are more.
template <typename T>
inline F load_eights(const T* a, const T* b) {
  if constexpr (sizeof(T) == 4) {
    return load_rows(a, b);
  } else {
    float wide[2][8];
    for (int k = 0; k < 8; ++k) wide[0][k] = one(a + k), wide[1][k] = one(b + k);
    return load_rows(wide[0], wide[1]);
  }
}

// to[step][row] = factor * from[row][step] for row < rows, zeros up to `width` (LANES or PANEL).
template <typename T>
void transpose_panel(const T* from, int64_t stride, int64_t rows, int64_t steps, float factor, int width, float* to) {
  for (int group = 0; group < width; group += LANES) {
    int64_t step = 0;
    if (rows >= group + LANES) {
      for (; step + 8 <= steps; step += 8) {
        I v[8];
        for (int i = 0; i < 8; ++i) {
          const T* a = from + (group + i) * stride + step;
          const T* b = from + (group + i + LANES - 8) * stride + step;
          v[i] = HARLORA_F2I(load_eights(a, b));
        }
        transpose8(v);
        for (int i = 0; i < 8; ++i) store(to + (step + i) * width + group, mul(HARLORA_I2F(v[i]), set(factor)));
      }
    }
    for (; step < steps; ++step) {
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t row = group + lane;
        to[step * width + row] = row < rows ? factor * one(from + row * stride + step) : 0.0f;
      }
    }
  }
}

// Decoding ----------------------------------------------------------------------------------------------------------

inline float decode_one(const Weight& w, int64_t index) {
  const int byte = w.packed[index >> 1];
  return w.code[index & 1 ? byte & 15 : byte >> 4] * w.scale(index >> w.log2_blocksize);
}

// The rows that a panel of forward is made of, from first_step on; columns past the last row repeat it.
struct PanelRows {
  const uint8_t* packed[PANEL];
  int64_t next;  // bytes to the panel after this one
  // Steps of one scale: 64, or 32 where blocks may begin within 64 steps.
  int log2_unit;

  PanelRows(const Weight& w, int64_t first_row, int64_t first_step, int64_t steps, float* scale)
      : log2_unit(w.in % GRANULE == 0 && w.log2_blocksize >= 6 ? 6 : 5) {
    const int64_t units = steps >> log2_unit;
    next = PANEL * w.in / 2;
    for (int column = 0; column < PANEL; ++column) {
      const int64_t start = smaller(first_row + column, w.out - 1) * w.in + first_step;
      packed[column] = w.packed + start / 2;
      for (int64_t u = 0; u < units; ++u) {
        scale[u * PANEL + column] = w.scale((start + (u << log2_unit)) >> w.log2_blocksize);
      }
    }
  }

  // Eight codes in each lane of v[i], of columns from `group` on and steps from `step` + 8 · i.
  void load(int group, int64_t step, I v[8]) const {
    for (int i = 0; i < 8; ++i) {
      const uint8_t* from = packed[group + i] + step / 2;
      const uint8_t* from_other = packed[group + i + LANES - 8] + step / 2;
      v[i] = load_rows(from, from_other);
      // The next line into the first cache; from memory, a panel early, into the second one: the processor itself does
      // not follow so many rows.
      __builtin_prefetch(from + LINE / 2);
      if (LANES > 8) __builtin_prefetch(from_other + LINE / 2);
      if (step % LINE == 0) {
        __builtin_prefetch(from + next, 0, 2);
        if (LANES > 8) __builtin_prefetch(from_other + next, 0, 2);
      }
    }
    transpose8(v);
  }
};

// panel[step][column] = Ŵ[first_row + column][first_step + step]. Columns past the last row repeat it.
void decode_transposed(const Weight& w, int64_t first_row, int64_t first_step, int64_t steps, float* panel) {
  if (w.dense != nullptr) {
    const float* from = w.dense + first_row * w.in + first_step;
    return transpose_panel(from, w.in, smaller(PANEL, w.out - first_row), steps, 1.0f, PANEL, panel);
  }
  int64_t step = 0;
  if (w.in % 32 == 0) {  // rows begin on bytes, and 32 codes never cross a block
    const Table table = load_table(w.code);
    const int64_t whole = steps / GRANULE * GRANULE;
    alignas(64) float scale[DEPTH / 32 * PANEL];
    const PanelRows rows(w, first_row, first_step, whole, scale);
    for (int64_t line = 0; line < whole; line += LINE) {
      for (int group = 0; group < PANEL; group += LANES) {
        for (step = line; step < smaller(line + LINE, whole); step += GRANULE) {
          I codes[8];
          rows.load(group, step, codes);
          for (int i = 0; i < 8; ++i) {
            const F s = load(scale + ((step + 8 * i) >> rows.log2_unit) * PANEL + group);
            float* to = panel + (step + 8 * i) * PANEL + group;
            // The first code of a byte is in its high half: nibble j holds step j ^ 1.
            for (int j = 0; j < 8; ++j) {
              store(to + (j ^ 1) * PANEL, mul(lookup(table, shift_right(codes[i], 4 * j)), s));
            }
          }
        }
      }
    }
    step = whole;
  }
  for (; step < steps; ++step) {
    for (int column = 0; column < PANEL; ++column) {
      panel[step * PANEL + column] = decode_one(w, smaller(first_row + column, w.out - 1) * w.in + first_step + step);
    }
  }
}

// Where column i of a panel of dX lies: even columns in the first half, odd ones in the second.
inline int permuted(int column) { return (column & 1) * LANES + (column >> 1); }

// panel[step][permuted(column)] = Ŵ[first_step + step][first_column + column], zeros past the last column.
void decode_straight(const Weight& w, int64_t first_column, int64_t first_step, int64_t steps, float* panel) {
  if (w.in % 32 == 0) {  // PANEL codes lie within one block
    const Table table = load_table(w.code);
    for (int64_t step = 0; step < steps; ++step, panel += PANEL) {
      const int64_t index = (first_step + step) * w.in + first_column;
      const F s = set(w.scale(index >> w.log2_blocksize));
      const I pairs = bytes(w.packed + index / 2);
      // Rows far apart, of which each panel takes little: they are called in time.
      const int64_t later = index + 48 * w.in;
      __builtin_prefetch(w.packed + later / 2);
      __builtin_prefetch(w.place_of_scale(later >> w.log2_blocksize));
      store(panel, mul(lookup(table, shift_right(pairs, 4)), s));
      store(panel + LANES, mul(lookup(table, pairs), s));
    }
    return;
  }
  for (int64_t step = 0; step < steps; ++step, panel += PANEL) {
    for (int column = 0; column < PANEL; ++column) {
      const bool inside = first_column + column < w.in;
      panel[permuted(column)] = inside ? decode_one(w, (first_step + step) * w.in + first_column + column) : 0.0f;
    }
  }
}

template <typename T>
void dequantize_as(const Weight& w, int64_t n, int64_t first_block, int64_t last_block, T* out) {
  const Table table = load_table(w.code);
  for (int64_t block = first_block; block < last_block; ++block) {
    const F s = set(w.scale(block));
    const int64_t start = block << w.log2_blocksize;
    const int64_t stop = smaller(n, start + (int64_t{1} << w.log2_blocksize));
    int64_t i = start;
    for (; i + PANEL <= stop; i += PANEL) {
      const I pairs = bytes(w.packed + i / 2);
      F first, second;
      interleave(mul(lookup(table, shift_right(pairs, 4)), s), mul(lookup(table, pairs), s), &first, &second);
      store(out + i, first);
      store(out + i + LANES, second);
    }
    for (; i < stop; ++i) put(out + i, decode_one(w, i));
  }
}

void dequantize(const Weight& w, int64_t n, int64_t first_block, int64_t last_block, Dtype dtype, void* out) {
  if (dtype == Dtype::float32) return dequantize_as(w, n, first_block, last_block, static_cast<float*>(out));
  if (dtype == Dtype::bfloat16) return dequantize_as(w, n, first_block, last_block, static_cast<BFloat16*>(out));
  return dequantize_as(w, n, first_block, last_block, static_cast<Half*>(out));
}

// Quantising --------------------------------------------------------------------------------------------------------

// FP4 codes by rising magnitude.
constexpr uint8_t fp4_by_magnitude[8] = {0, 1, 6, 7, 4, 5, 2, 3};

template <typename T>
void quantize_as(const T* weight, int64_t n, bool fp4, const float* bounds, int log2_blocksize, int64_t first_block,
                 int64_t last_block, uint8_t* packed, float* absmax) {
  constexpr int64_t CHUNK = 64;  // blocks have 32, or a multiple of 64
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t start = block << log2_blocksize;
    const int64_t stop = smaller(n, start + (int64_t{1} << log2_blocksize));
    float largest = 0.0f;
    for (int64_t i = start; i < stop; ++i) {
      const float magnitude = __builtin_fabsf(one(weight + i));
      largest = magnitude > largest ? magnitude : largest;
    }
    absmax[block] = largest;
    // Of a block of zeros this is infinite, and 0 · inf = NaN exceeds no bound: code 0.
    const float inverse = 1.0f / largest;
    for (int64_t i = start; i < stop; i += CHUNK) {
      const int64_t count = smaller(CHUNK, stop - i);
      float value[CHUNK];
      int32_t code[CHUNK];
      for (int64_t k = 0; k < count; ++k) value[k] = one(weight + i + k) * inverse;
      for (int64_t k = count; k < CHUNK; ++k) value[k] = 0.0f;
      if (fp4) {
        for (int k = 0; k < CHUNK; ++k) {
          int32_t c = 0;
          for (int b = 0; b < 7; ++b) c += __builtin_fabsf(value[k]) > bounds[b];
          code[k] = fp4_by_magnitude[c] | (value[k] < 0.0f ? 8 : 0);
        }
      } else {
        for (int k = 0; k < CHUNK; ++k) {
          int32_t c = 0;
          for (int b = 0; b < 15; ++b) c += value[k] > bounds[b];
          code[k] = c;
        }
      }
      // Past the last value stands the code of 0.
      for (int64_t k = 0; k < count; k += 2) {
        packed[(i + k) / 2] = static_cast<uint8_t>(code[k] << 4 | code[k + 1]);
      }
    }
  }
}

void quantize(const void* weight, Dtype dtype, int64_t n, bool fp4, const float* bounds, int log2_blocksize,
              int64_t first_block, int64_t last_block, uint8_t* packed, float* absmax) {
  const auto run = [&](const auto* typed) {
    quantize_as(typed, n, fp4, bounds, log2_blocksize, first_block, last_block, packed, absmax);
  };
  if (dtype == Dtype::float32) return run(static_cast<const float*>(weight));
  if (dtype == Dtype::bfloat16) return run(static_cast<const BFloat16*>(weight));
  return run(static_cast<const Half*>(weight));
}

// The tile ----------------------------------------------------------------------------------------------------------

// c[i][:] = init[i][:] + sum over steps of a[i][step] · b[step][:], for R rows and V vectors of columns.
//
// a[i][step] is a[i * a_row + step * a_step]; init[i] is init[i * init_row], so a stride of 0 repeats a bias.
template <int R, int V>
void tile(int64_t steps, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
          const float* init, int64_t init_row, float* c, int64_t c_row) {
  F sum[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = load(init + i * init_row + v * LANES);
  }
  // Three rows share a pointer, so that the addresses of all rows fit the registers.
  constexpr int POINTERS = (R + 2) / 3;
  const float* row[POINTERS];
#pragma GCC unroll 8
  for (int p = 0; p < POINTERS; ++p) row[p] = a + 3 * p * a_row;
  for (int64_t step = 0; step < steps; ++step) {
    F column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + v * LANES);
    b += b_step;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const F value = set(row[i / 3][(i % 3) * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = fma(value, column[v], sum[i][v]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < POINTERS; ++p) row[p] += a_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + i * c_row + v * LANES, sum[i][v]);
  }
}

using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                      int64_t);

template <int V>
inline Tile tile_of(int64_t rows) {
  static constexpr Tile tiles[] = {
      tile<1, V>, tile<2, V>, tile<3, V>, tile<4, V>,
#if !defined(HARLORA_PORTABLE)
      tile<5, V>, tile<6, V>,
#endif
#if defined(HARLORA_AVX512)
      tile<7, V>, tile<8, V>, tile<9, V>, tile<10, V>, tile<11, V>, tile<12, V>, tile<13, V>, tile<14, V>,
#endif
  };
  static_assert(sizeof(tiles) / sizeof(Tile) == ROWS);
  return tiles[rows - 1];
}

// How many rows the next tile takes of `rows`, so that all tiles are about the same.
inline int64_t next_tile(int64_t rows, int64_t most = ROWS) {
  const int64_t tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

constexpr int64_t PACKED_A = ROWS * DEPTH;

// c[m][:] = init[m][:] + a[m][0:steps] · b, rows of `a` of any dtype; those that are not float32 are widened into
// `packed_a`, which has room for PACKED_A floats. Copying float32 rows too, so that rows a multiple of 2 KiB apart do
// not meet in one set of the cache, was measured 10 % slower at (64, 4096, 4096).
template <int V, typename T>
void multiply(int64_t rows, int64_t steps, const T* a, int64_t a_row, const float* b, const float* init,
              int64_t init_row, float* c, int64_t c_row, float* packed_a) {
  for (int64_t m = 0; m < rows;) {
    const int64_t count = next_tile(rows - m);
    if constexpr (sizeof(T) == 4) {
      tile_of<V>(count)(steps, a + m * a_row, a_row, 1, b, V * LANES, init + m * init_row, init_row, c + m * c_row,
                        c_row);
    } else {
      const int64_t width = (steps + LANES - 1) / LANES * LANES;
      for (int64_t i = 0; i < count; ++i) widen(a + (m + i) * a_row, steps, width, packed_a + i * width);
      tile_of<V>(count)(steps, packed_a, width, 1, b, V * LANES, init + m * init_row, init_row, c + m * c_row, c_row);
    }
    m += count;
  }
}

alignas(64) constexpr float zeros[PANEL] = {};

// c[r][:] of `ranks` rows and `columns` columns = sum over rows of a[row][r] · b[row][:]; c is (ranks, PANEL).
template <typename T>
void multiply_over_rows(int64_t rows, const float* a, int64_t a_row, int64_t ranks, const T* b, int64_t b_row,
                        int64_t columns, float* c) {
  alignas(64) float packed_b[DEPTH * PANEL];
  if (rows == 0) __builtin_memset(c, 0, sizeof(float) * PANEL * static_cast<unsigned long>(ranks));
  for (int64_t m = 0; m < rows; m += DEPTH) {
    const int64_t count = smaller(DEPTH, rows - m);
    const float* from = packed_b;
    int64_t from_row = PANEL;
    bool copy = true;
    if constexpr (sizeof(T) == 4) {
      if (columns == PANEL) copy = false, from = b + m * b_row, from_row = b_row;
    }
    if (copy) {
      for (int64_t i = 0; i < count; ++i) widen(b + (m + i) * b_row, columns, PANEL, packed_b + i * PANEL);
    }
    for (int64_t r = 0; r < ranks;) {
      const int64_t tall = next_tile(ranks - r);
      const bool fresh = m == 0;
      tile_of<2>(tall)(count, a + m * a_row + r, 1, a_row, from, from_row, fresh ? zeros : c + r * PANEL,
                       fresh ? 0 : PANEL, c + r * PANEL, PANEL);
      r += tall;
    }
  }
}

#if defined(HARLORA_BYTES)
// Products in fewer bits --------------------------------------------------------------------------------------------
//
// The weight's codes are multiplied alone, in bfloat16 or in 8 bits, and the sum of each block of 64 products is scaled
// in float32. A type for each format knows the rest:
//
//   STEPS, Sum   steps in one 32-bit lane, and what their products are added up in
//   table        of the 16 codes                    decode       eight codes in each lane, to 8 / STEPS vectors
//   at           STEPS values of a row, repeated    dot          adds products
//   from_start   what sums of a block begin with    finish       adds a sum, scaled, to one of float32
//
// and for few rows, where a line of CODES codes is decoded to VECTORS vectors:
//
//   decode_line  returns what sums begin with       arrange      brings a row of x into the same order, between others

constexpr int BLOCK_ROWS = LANES == 16 ? 7 : 2;  // of the tile: sums of blocks and sums of all side by side
constexpr int CODES = 8 * LANES;                 // GROUP blocks
static_assert(GRANULE == kBlock);                // one scale for what is decoded at a time

// A decoded panel: codes[step / STEPS][column][STEPS], and for each block of 64 steps and column the scale and what the
// sum of products begins with.
struct Panel {
  uint8_t* codes;
  float* scale;
  int32_t* start;
};

#if defined(HARLORA_BF16)
struct PairRows {  // products of bfloat16 are exact in float32
  const BFloat16* x;
  int64_t row;

  static constexpr int STEPS = 2, VECTORS = 4;
  using Sum = F;
  static I table(const float* code) {
    alignas(64) BFloat16 values[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) values[i] = to_bfloat16(code[i % 16]);
    return load_bytes(values);
  }
  // The first code of a byte is in its high half.
  static void decode(I table, I codes, uint8_t* to, I*) {
    store_bytes(to, lookup_halves(table, halves_of_byte<0>(codes)));
    store_bytes(to + 4 * PANEL, lookup_halves(table, halves_of_byte<1>(codes)));
    store_bytes(to + 8 * PANEL, lookup_halves(table, halves_of_byte<2>(codes)));
    store_bytes(to + 12 * PANEL, lookup_halves(table, halves_of_byte<3>(codes)));
  }
  PairRows from(int64_t m, int64_t step) const { return {x + m * row + step, row}; }
  I at(int i, int64_t step) const { return set_pair(x + i * row + step); }
  static Sum from_start(I) { return zero(); }
  static Sum dot(I weight, I x, Sum sum) { return dot_pairs(x, weight, sum); }
  static F finish(Sum part, F weight_scale, F, F sum) { return fma(part, weight_scale, sum); }
  static constexpr bool SCALED = false;  // x
  F scale(int, int64_t) const { return zero(); }

  // Vector j has of each four codes that of bits 4·j.
  static I decode_line(I table, I line, I values[VECTORS]) {
    for (int j = 0; j < VECTORS; ++j) values[j] = lookup_halves(table, shift_right_halves(line, 4 * j));
    return line;
  }
  static void arrange(const BFloat16* from, int64_t n, uint8_t* to, float*, int64_t rows) {
    for (int64_t line = 0; line < n; line += CODES, to += rows * VECTORS * 4 * LANES) {
      for (int i = 0; i < VECTORS * 2 * LANES; ++i) {
        const int64_t step = line + i % (2 * LANES) * 4 + (i / (2 * LANES) ^ 1);
        const BFloat16 value = step < n ? from[step] : BFloat16{0};
        __builtin_memcpy(to + 2 * i, &value, sizeof value);
      }
    }
  }
  static void arrange(const float* from, int64_t n, uint8_t* to, float* scale, int64_t rows) {
    alignas(64) BFloat16 rounded[FEW_VALUES];
    narrow(from, n, rounded);
    arrange(rounded, n, to, scale, rows);
  }
};
#endif

// x by 64 values in 8 bits, 128 higher, since one factor has to be unsigned. Its scale is for both factors, whose values
// are 127 times too large.
void round_to_bytes(const float* x, int64_t n, const Bytes& to) {
  const I magnitude = set(0x7FFFFFFF);
  for (int64_t block = 0; block < n / kBlock; ++block) {
    const float* from = x + block * kBlock;
    // Magnitudes compare as integers, infinity above all numbers and NaN above infinity: the scale is what they are.
    I largest = set(0);
    for (int i = 0; i < kBlock; i += LANES) {
      largest = maximum(largest, both(HARLORA_F2I(load(from + i)), magnitude));
    }
    const int32_t bits = largest_of(largest);
    float most;
    __builtin_memcpy(&most, &bits, sizeof most);
    to.scale[block] = most * (1.0f / (127 * 127));
    const F inverse = set(most > 1e-36f ? 127.0f / most : 0.0f);  // that of a smaller one is infinite
    for (int i = 0; i < kBlock; i += LANES) store_above_128(to.values + block * kBlock + i, mul(load(from + i), inverse));
  }
}

struct ByteRows {  // sums of 64 products of 8 bits are exact integers
  Bytes x;
  int64_t row;

  static constexpr int STEPS = 4, VECTORS = 2;
  using Sum = I;
  // 127 times the values: NF4 and FP4 lie within half a 127th of a block's largest value.
  static I table(const float* code) {
    alignas(64) int8_t values[4 * LANES];
    for (int i = 0; i < 4 * LANES; ++i) {
      values[i] = static_cast<int8_t>(static_cast<int>(code[i % 16] * 127.0f + 128.5f) - 128);
    }
    return load_bytes(values);
  }
  // The even steps first, as in x. `start` takes off the 128 by which x is too high.
  HARLORA_BYTES static void decode(I table, I codes, uint8_t* to, I* start) {
    I values[VECTORS];
    *start = add(*start, decode_line(table, codes, values));
    store_bytes(to, values[0]);
    store_bytes(to + 4 * PANEL, values[1]);
  }
  ByteRows from(int64_t m, int64_t step) const {
    const int64_t values = m * row + step;
    return {{x.values + values, x.scale + values / kBlock}, row};
  }
  I at(int i, int64_t step) const {
    int32_t four;
    __builtin_memcpy(&four, x.values + i * row + step, sizeof four);
    return set(four);
  }
  static Sum from_start(I start) { return start; }
  HARLORA_BYTES static Sum dot(I weight, I x, Sum sum) { return dot_bytes(x, weight, sum); }
  static F finish(Sum part, F weight_scale, F x_scale, F sum) {
    return fma(to_float(part), mul(weight_scale, x_scale), sum);
  }
  static constexpr bool SCALED = true;
  F scale(int i, int64_t block) const { return set(x.scale[i * (row / kBlock) + block]); }

  HARLORA_BYTES static I decode_line(I table, I line, I values[VECTORS]) {
    const I low = set(0x0F0F0F0F), high = set(static_cast<int32_t>(0x80808080));
    values[0] = lookup_bytes(table, both(shift_right(line, 4), low));
    values[1] = lookup_bytes(table, both(line, low));
    return sub(set(0), dot_bytes(high, values[1], dot_bytes(high, values[0], set(0))));
  }
  static void arrange(const float* from, int64_t n, uint8_t* to, float* scale, int64_t rows) {
    alignas(64) uint8_t values[FEW_VALUES];
    float scales[FEW_VALUES / kBlock];
    round_to_bytes(from, n, {values, scales});
    for (int64_t line = 0; line < n; line += CODES, to += rows * VECTORS * 4 * LANES, scale += rows * GROUP) {
      for (int i = 0; i < LANES; ++i) {  // past the row's end the weight's scale is 0
        const int64_t eight = smaller(line + 8 * i, n - 8);
        __builtin_memcpy(to + 4 * i, values + eight, 4);
        __builtin_memcpy(to + 4 * (LANES + i), values + eight + 4, 4);
      }
      for (int i = 0; i < GROUP; ++i) scale[i] = scales[smaller(line / kBlock + i, n / kBlock - 1)];
    }
  }
};

// The panel of rows of the weight from first_row. Columns past the last row repeat it.
template <typename X>
HARLORA_BYTES void decode_blocks(const Weight& w, int64_t first_row, int64_t first_step, int64_t steps,
                                 const Panel& panel) {
  const I table = X::table(w.code);
  const PanelRows rows(w, first_row, first_step, steps, panel.scale);
  for (int64_t line = 0; line < steps; line += LINE) {
    for (int group = 0; group < PANEL; group += LANES) {
      for (int64_t step = line; step < smaller(line + LINE, steps); step += GRANULE) {
        I codes[8], start = set(0);
        rows.load(group, step, codes);
        for (int i = 0; i < 8; ++i) {
          X::decode(table, codes[i], panel.codes + (step + 8 * i) * PANEL * (4 / X::STEPS) + 4 * group, &start);
        }
        store_bytes(panel.start + step / GRANULE * PANEL + group, start);
      }
    }
  }
}

// c[i][:] = init[i][:] + x[i][:] · panel for R rows.
template <int R, typename X>
HARLORA_BYTES void tile_blocks(int64_t steps, const X& x, const Panel& panel, const float* init, int64_t init_row,
                               float* c, int64_t c_row) {
  F sum[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    sum[i][0] = load(init + i * init_row);
    sum[i][1] = load(init + i * init_row + LANES);
  }
  const uint8_t* codes = panel.codes;
  int64_t step = 0;
  for (int64_t block = 0; step < steps; ++block) {
    typename X::Sum part[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      part[i][0] = X::from_start(load_bytes(panel.start + block * PANEL));
      part[i][1] = X::from_start(load_bytes(panel.start + block * PANEL + LANES));
    }
    for (const int64_t stop = step + GRANULE; step < stop; step += X::STEPS) {
      const I left = load_bytes(codes), right = load_bytes(codes + 4 * LANES);
      codes += 4 * PANEL;
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const I values = x.at(i, step);
        part[i][0] = X::dot(left, values, part[i][0]);
        part[i][1] = X::dot(right, values, part[i][1]);
      }
    }
    const F left = load(panel.scale + block * PANEL), right = load(panel.scale + block * PANEL + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const F x_scale = x.scale(i, block);
      sum[i][0] = X::finish(part[i][0], left, x_scale, sum[i][0]);
      sum[i][1] = X::finish(part[i][1], right, x_scale, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    store(c + i * c_row, sum[i][0]);
    store(c + i * c_row + LANES, sum[i][1]);
  }
}

template <typename X>
void multiply_blocks(int64_t rows, int64_t steps, const X& x, const Panel& panel, const float* init, int64_t init_row,
                     float* c, int64_t c_row) {
  static constexpr decltype(&tile_blocks<1, X>) tiles[] = {
      tile_blocks<1, X>, tile_blocks<2, X>,
#if defined(HARLORA_AVX512)
      tile_blocks<3, X>, tile_blocks<4, X>, tile_blocks<5, X>, tile_blocks<6, X>, tile_blocks<7, X>,
#endif
  };
  static_assert(sizeof(tiles) / sizeof(tiles[0]) == BLOCK_ROWS);
  for (int64_t m = 0; m < rows;) {
    const int64_t count = next_tile(rows - m, BLOCK_ROWS);
    tiles[count - 1](steps, x.from(m, 0), panel, init + m * init_row, init_row, c + m * c_row, c_row);
    m += count;
  }
}
#endif

// What stands between the linear layers of a transformer block -------------------------------------------------------

// e^x, within 1.2e-7 of it relatively, for -87 <= x <= 88; 1.2e-38 below. NaN of NaN: `maximum` takes its second
// argument where either is NaN.
inline F exponential(F x) {
  x = maximum(set(-87.0f), x);
  // n = x / ln 2 to the nearest integer, found in the low bits of a sum that is too large for a fraction.
  const F shifted = fma(x, set(1.44269504f), set(12582912.0f));
  const F n = sub(shifted, set(12582912.0f));
  const F r = fma(n, set(-1.42860677e-6f), fma(n, set(-0.693145752f), x));  // ln 2 in two parts
  F sum = set(1.0f / 5040);  // Taylor: |r| <= 0.35, the next term is below 6e-9
  const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float term : terms) sum = fma(sum, r, set(term));
  // The sum of integers may have made a number of a NaN, whose bits are not all known; 0 · x does not.
  return fma(zero(), x, HARLORA_I2F(add(HARLORA_F2I(sum), shift_left(HARLORA_F2I(shifted), 23))));
}

// erfc(|x| / √2) / 2, with erfc(t) = exp(-t·p(t)) for t >= 0; p fitted so that erfc is within 2.3e-9 before rounding.
inline F half_erfc(F size) {
  const F t = minimum(mul(size, set(0.707106781f)), set(4.2f));  // erfc(4.2) is nothing beside 1
  const float terms[] = {1.0602663e-4f,   -5.87950624e-4f, 1.57675997e-3f, -5.87813920e-5f,
                         -1.92171428e-2f, 0.102799207f,    0.636616111f,   1.12837934f};
  F p = set(-8.04382125e-6f);
  for (float term : terms) p = fma(p, t, set(term));
  return mul(exponential(sub(zero(), mul(t, p))), set(0.5f));
}

// x·Φ(x) = max(x, 0) - |x|·erfc(|x| / √2) / 2; the second part vanishes where half_erfc cuts t off.
inline F gelu(F x) {
  const F size = maximum(x, sub(zero(), x));
  return sub(maximum(zero(), x), mul(minimum(size, set(5.93969696f)), half_erfc(size)));
}

void gelu_of(const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, gelu(load(x + i)));
  if (i < n) {
    float rest[LANES];
    widen(x + i, n - i, LANES, rest);
    store(rest, gelu(load(rest)));
    narrow(rest, n - i, y + i);
  }
}

// gelu'(x) = Φ(x) + x·φ(x); φ(13) is nothing.
inline F gelu_slope(F x) {
  const F size = maximum(x, sub(zero(), x)), tail = half_erfc(size);
  const F side = minimum(set(1.0f), maximum(zero(), mul(x, set(1e38f))));  // 1 for x > 0, 0 for x <= 0
  const F cumulative = fma(side, sub(set(1.0f), add(tail, tail)), tail);
  const F bounded = minimum(set(13.0f), maximum(set(-13.0f), x));
  const F density = mul(exponential(mul(mul(bounded, bounded), set(-0.5f))), set(0.398942280f));
  return fma(bounded, density, cumulative);
}

void gelu_backward(const float* x, int64_t n, float* grad) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(grad + i, mul(load(grad + i), gelu_slope(load(x + i))));
  if (i < n) {
    float rest[LANES], rest_grad[LANES];
    widen(x + i, n - i, LANES, rest);
    widen(grad + i, n - i, LANES, rest_grad);
    store(rest_grad, mul(load(rest_grad), gelu_slope(load(rest))));
    narrow(rest_grad, n - i, grad + i);
  }
}

inline float sum_of(F v) {
  float all[LANES];
  store(all, v);
  for (int step = LANES / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) all[i] += all[i + step];
  }
  return all[0];
}

void layer_norm(const float* x, int64_t rows, int64_t width, const float* gain, const float* bias, float eps,
                float* y) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t m = 0; m < rows; ++m, x += width, y += width) {
    F sum = zero();
    float rest = 0.0f;
    for (int64_t k = 0; k < whole; k += LANES) sum = add(sum, load(x + k));
    for (int64_t k = whole; k < width; ++k) rest += x[k];
    const float mean = (sum_of(sum) + rest) / static_cast<float>(width);
    F squares = zero();
    rest = 0.0f;
    for (int64_t k = 0; k < whole; k += LANES) {
      const F centred = sub(load(x + k), set(mean));
      squares = fma(centred, centred, squares);
    }
    for (int64_t k = whole; k < width; ++k) rest += (x[k] - mean) * (x[k] - mean);
    const float variance = (sum_of(squares) + rest) / static_cast<float>(width);
    const float scale = 1.0f / __builtin_sqrtf(variance + eps);
    for (int64_t k = 0; k < whole; k += LANES) {
      const F centred = mul(sub(load(x + k), set(mean)), set(scale));
      store(y + k, fma(centred, load(gain + k), load(bias + k)));
    }
    for (int64_t k = whole; k < width; ++k) y[k] = (x[k] - mean) * scale * gain[k] + bias[k];
  }
}

inline int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Up to so many tokens a panel would be padding for the most part.
constexpr int64_t FEW_TOKENS = 8;

int64_t attention_scratch(int64_t tokens, int64_t width, int64_t heads) {
  const int64_t size = width / heads;
  // Scores and their gradients, then a panel of `size` or `tokens` steps, then a strip of results.
  return 2 * tokens * padded(tokens) + PANEL * (size > tokens ? size : tokens) + tokens * PANEL;
}

// One head: what lies where, and the products that forward and backward share. Matrices of a head have `tokens` rows
// of `size` values, `width` apart; square ones have `tokens` rows, `stride` apart.
struct Head {
  int64_t tokens, width, size, stride;
  float* scores;
  float* grads;
  float* panel;
  float* strip;

  Head(int64_t tokens, int64_t width, int64_t heads, float* scratch)
      : tokens(tokens), width(width), size(width / heads), stride(few() ? LANES : padded(tokens)) {
    scores = scratch;
    grads = scores + tokens * stride;
    panel = grads + tokens * stride;
    strip = panel + PANEL * (size > tokens ? size : tokens);
  }

  int64_t offset(int64_t head) const { return head / (width / size) * tokens * width + head % (width / size) * size; }

  bool few() const { return tokens <= FEW_TOKENS && size % LANES == 0; }

  // The same as `square` and `product` for few tokens: vectors lie along the values of the head.
  void square_of_few(const float* a, const float* b, float factor, float* to) const {
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t n = tokens; n < stride; ++n) to[m * stride + n] = 0.0f;
    }
    const int64_t pairs = tokens * tokens;
    for (int64_t first = 0; first < pairs; first += 4) {
      const float *rows[4], *columns[4];
      float* places[4];
      float unused;
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t pair = first + i < pairs ? first + i : first, m = pair / tokens, n = pair % tokens;
        rows[i] = a + m * width;
        columns[i] = b + n * width;
        places[i] = first + i < pairs ? to + m * stride + n : &unused;
      }
      F sums[4];
      for (int i = 0; i < 4; ++i) sums[i] = zero();
      for (int64_t k = 0; k < size; k += LANES) {
        for (int i = 0; i < 4; ++i) sums[i] = fma(load(rows[i] + k), load(columns[i] + k), sums[i]);
      }
      constexpr int GROUPS = LANES / 8;
      float found[4 * GROUPS];
      sum_groups(sums, found);
      for (int i = 0; i < 4; ++i) {
        const float sum = GROUPS > 1 ? found[GROUPS * i] + found[GROUPS * i + 1] : found[i];
        *places[i] = factor * sum;
      }
    }
  }
  void product_of_few(const float* a, bool transposed, const float* b, float* to) const {
    const int64_t row = transposed ? 1 : stride, step = transposed ? stride : 1;
    for (int64_t k = 0; k < size; k += LANES) {
      F values[FEW_TOKENS];
      for (int64_t n = 0; n < tokens; ++n) values[n] = load(b + n * width + k);
      for (int64_t m = 0; m < tokens; ++m) {
        F sum = zero();
        for (int64_t n = 0; n < tokens; ++n) sum = fma(set(a[m * row + n * step]), values[n], sum);
        store(to + m * width + k, sum);
      }
    }
  }

  // to = factor · a · bᵀ, a square one.
  void square(const float* a, const float* b, float factor, float* to) const {
    if (few()) return square_of_few(a, b, factor, to);
    for (int64_t n = 0; n < tokens; n += PANEL) {
      transpose_panel(b + n * width, width, smaller(PANEL, tokens - n), size, factor, PANEL, panel);
      multiply<2>(tokens, size, a, width, panel, zeros, 0, to + n, stride, nullptr);
    }
  }

  // to = a · b, or aᵀ · b, of a square `a`.
  void product(const float* a, bool transposed, const float* b, float* to) const {
    if (few()) return product_of_few(a, transposed, b, to);
    for (int64_t n = 0; n < size; n += PANEL) {
      const int64_t columns = smaller(PANEL, size - n);
      if (transposed) {
        multiply_over_rows(tokens, a, stride, tokens, b + n, width, columns, strip);
      } else {
        for (int64_t m = 0; m < tokens; ++m) widen(b + m * width + n, columns, PANEL, panel + m * PANEL);
        multiply<2>(tokens, tokens, a, stride, panel, zeros, 0, strip, PANEL, nullptr);
      }
      for (int64_t m = 0; m < tokens; ++m) narrow(strip + m * PANEL, columns, to + m * width + n);
    }
  }

  // softmax of the rows of scores; zeros from `tokens` to `stride`.
  void softmax() const {
    for (int64_t m = 0; m < tokens; ++m) {
      float* row = scores + m * stride;
      float largest = row[0];
      for (int64_t n = 1; n < tokens; ++n) largest = row[n] > largest ? row[n] : largest;
      for (int64_t n = tokens; n < stride; ++n) row[n] = -1e30f;
      F sum = zero();
      for (int64_t n = 0; n < stride; n += LANES) {
        store(row + n, exponential(sub(load(row + n), set(largest))));
      }
      for (int64_t n = tokens; n < stride; ++n) row[n] = 0.0f;
      for (int64_t n = 0; n < stride; n += LANES) sum = add(sum, load(row + n));
      const float inverse = 1.0f / sum_of(sum);
      for (int64_t n = 0; n < stride; n += LANES) store(row + n, mul(load(row + n), set(inverse)));
    }
  }
};

void attention(const float* q, const float* k, const float* v, int64_t tokens, int64_t width, int64_t heads,
               int64_t first, int64_t last, float* scratch, float* y) {
  const Head h(tokens, width, heads, scratch);
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(h.size));
  for (int64_t head = first; head < last; ++head) {
    const int64_t offset = h.offset(head);
    h.square(q + offset, k + offset, factor, h.scores);
    h.softmax();
    h.product(h.scores, false, v + offset, y + offset);
  }
}

// With P the softmax and S its argument: dV = Pᵀ·dY, dP = dY·Vᵀ, dS = P ∘ (dP - Σ P ∘ dP), dQ = dS·K, dK = dSᵀ·Q.
void attention_backward(const float* grad, const float* q, const float* k, const float* v, int64_t tokens,
                        int64_t width, int64_t heads, int64_t first, int64_t last, float* scratch, float* grad_q,
                        float* grad_k, float* grad_v) {
  const Head h(tokens, width, heads, scratch);
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(h.size));
  for (int64_t head = first; head < last; ++head) {
    const int64_t offset = h.offset(head);
    h.square(q + offset, k + offset, factor, h.scores);
    h.softmax();
    h.product(h.scores, true, grad + offset, grad_v + offset);
    h.square(grad + offset, v + offset, 1.0f, h.grads);
    for (int64_t m = 0; m < tokens; ++m) {
      const float* p = h.scores + m * h.stride;
      float* row = h.grads + m * h.stride;
      F sum = zero();
      // Past the last token both are zeros.
      for (int64_t n = 0; n < h.stride; n += LANES) sum = fma(load(p + n), load(row + n), sum);
      const F delta = set(sum_of(sum));
      for (int64_t n = 0; n < h.stride; n += LANES) {
        store(row + n, mul(mul(load(p + n), set(factor)), sub(load(row + n), delta)));
      }
    }
    h.product(h.grads, false, k + offset, grad_q + offset);
    h.product(h.grads, true, q + offset, grad_k + offset);
  }
}

// Forward -----------------------------------------------------------------------------------------------------------

// c[m][0:rank] of rows m in [first_row, last_row): a · b, with b given by `pack(first_step, steps, first, width, to)`.
template <typename T, typename Pack>
void multiply_thin(const T* a, int64_t a_row, int64_t depth, int rank, int64_t first_row, int64_t last_row, float* c,
                   const Pack& pack) {
  alignas(64) float panel[DEPTH * PANEL];
  alignas(64) float block[ROW_BLOCK * PANEL];
  alignas(64) float packed_a[PACKED_A];
  for (int first = 0; first < rank; first += PANEL) {
    const int64_t columns = smaller(PANEL, rank - first);
    const int width = columns <= LANES ? LANES : PANEL;
    for (int64_t m = first_row; m < last_row; m += ROW_BLOCK) {
      const int64_t rows = smaller(ROW_BLOCK, last_row - m);
      for (int64_t step = 0; step == 0 || step < depth; step += DEPTH) {
        const int64_t steps = smaller(DEPTH, depth - step);
        if (depth > DEPTH || m == first_row) pack(step, steps, first, width, panel);
        const float* init = step == 0 ? zeros : block;
        const int64_t init_row = step == 0 ? 0 : width;
        const T* from = a + m * a_row + step;
        if (width == LANES) {
          multiply<1>(rows, steps, from, a_row, panel, init, init_row, block, width, packed_a);
        } else {
          multiply<2>(rows, steps, from, a_row, panel, init, init_row, block, width, packed_a);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < columns; ++k) c[(m + i) * rank + first + k] = block[i * width + k];
      }
    }
  }
}

template <typename T>
void forward_t_as(const Forward& job, int64_t first_row, int64_t last_row) {
  const auto* lora_A = static_cast<const T*>(job.lora_A);
  const int64_t in = job.weight.in;
  multiply_thin(static_cast<const T*>(job.x), in, in, job.rank, first_row, last_row, job.t,
                [&](int64_t step, int64_t steps, int first, int width, float* to) {
                  transpose_panel(lora_A + first * in + step, in, smaller(width, job.rank - first), steps, 1.0f, width,
                                  to);
                });
}

// x = residual + gelu(x) over PANEL values, of which `columns` count.
inline void finish(float* x, int64_t columns, bool with_gelu, const float* residual) {
  if (columns < PANEL) {  // the residual ends before the panel does
    alignas(64) float padded[PANEL];
    if (residual != nullptr) widen(residual, columns, PANEL, padded);
    return finish(x, PANEL, with_gelu, residual == nullptr ? nullptr : padded);
  }
  for (int v = 0; v < PANEL; v += LANES) {
    F value = load(x + v);
    if (with_gelu) value = gelu(value);
    if (residual != nullptr) value = add(value, load(residual + v));
    store(x + v, value);
  }
}

template <typename T>
void forward_as(const Forward& job, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row) {
  alignas(64) float panel[DEPTH * PANEL];
  alignas(64) float block[ROW_BLOCK * PANEL];
#if defined(HARLORA_BYTES)
  alignas(64) float scale[DEPTH / GRANULE * PANEL];
  alignas(64) int32_t start[DEPTH / GRANULE * PANEL];
#endif
  alignas(64) float packed_a[PACKED_A];
  alignas(64) float branch[RANKS * PANEL];
  alignas(64) float bias[PANEL];
  const auto* x = static_cast<const T*>(job.x);
  const auto* lora_B = static_cast<const T*>(job.lora_B);
  const int64_t in = job.weight.in, out = job.weight.out;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t n = p * PANEL, columns = smaller(PANEL, out - n);
    if (job.bias != nullptr) {
      widen(static_cast<const T*>(job.bias) + n, columns, PANEL, bias);
    } else {
      widen(zeros, PANEL, PANEL, bias);
    }
    // Accumulate in y itself, unless it may still hold the residual.
    const bool direct = sizeof(T) == 4 && columns == PANEL && job.residual == nullptr;
    const int64_t row_block = direct ? last_row - first_row : ROW_BLOCK;
    for (int64_t m = first_row; m < last_row; m += row_block) {
      const int64_t rows = smaller(row_block, last_row - m);
      float* c = block;
      int64_t c_row = PANEL;
      if constexpr (sizeof(T) == 4) {
        if (direct) c = static_cast<float*>(job.y) + m * out + n, c_row = out;
      }
      for (int64_t step = 0; step == 0 || step < in; step += job.depth) {
        const int64_t steps = smaller(job.depth, in - step);
        const float* init = step == 0 ? bias : c;
        const int64_t init_row = step == 0 ? 0 : c_row;
        const bool fresh = in > job.depth || m == first_row;
#if defined(HARLORA_BYTES)
        const Panel codes{reinterpret_cast<uint8_t*>(panel), scale, start};
        if (job.precision == Precision::int8) {
          const ByteRows bytes{job.x8, in};
          if (fresh) decode_blocks<ByteRows>(job.weight, n, step, steps, codes);
          multiply_blocks(rows, steps, bytes.from(m, step), codes, init, init_row, c, c_row);
          continue;
        }
#endif
#if defined(HARLORA_BF16)
        if (job.precision == Precision::bfloat16) {
          const PairRows pairs{sizeof(T) == 2 ? static_cast<const BFloat16*>(job.x) : job.x16, in};
          if (fresh) decode_blocks<PairRows>(job.weight, n, step, steps, codes);
          multiply_blocks(rows, steps, pairs.from(m, step), codes, init, init_row, c, c_row);
          continue;
        }
#endif
        if (fresh) decode_transposed(job.weight, n, step, steps, panel);
        multiply<2>(rows, steps, x + m * in + step, in, panel, init, init_row, c, c_row, packed_a);
      }
      for (int first = 0; first < job.rank; first += RANKS) {
        const int64_t ranks = smaller(RANKS, job.rank - first);
        if (job.rank > RANKS || m == first_row) {
          transpose_panel(lora_B + n * job.rank + first, job.rank, columns, ranks, job.scaling, PANEL, branch);
        }
        multiply<2>(rows, ranks, job.t + m * job.rank + first, job.rank, branch, c, c_row, c, c_row, packed_a);
      }
      if (job.gelu || job.residual != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          const float* residual = job.residual == nullptr ? nullptr : job.residual + (m + i) * out + n;
          finish(c + i * c_row, columns, job.gelu, residual);
        }
      }
      if (!direct) {
        for (int64_t i = 0; i < rows; ++i) {
          narrow(block + i * PANEL, columns, static_cast<T*>(job.y) + (m + i) * out + n);
        }
      }
    }
  }
}

// Forward of few rows -----------------------------------------------------------------------------------------------

bool forward_few_serves(const Forward& job) {
#ifdef HARLORA_PORTABLE
  (void)job;
  return false;
#else
  if (job.rows > 2 && job.dtype != Dtype::float32 && job.precision == Precision::float32) return false;
  if (job.weight.dense != nullptr || job.gelu || job.residual != nullptr) return false;
  if (job.weight.in % GRANULE != 0 || job.weight.log2_blocksize < 6) return false;
  return job.rows > 0 && job.rows <= FEW && job.rank <= RANKS &&
         job.rows * job.weight.in <= FEW_VALUES;
#endif
}

template <typename T>
void forward_few_t_as(const Forward& job, int64_t first_rank, int64_t last_rank) {
  const int64_t in = job.weight.in;  // a multiple of GRANULE
  for (int64_t r = first_rank; r < last_rank; ++r) {
    const T* a = static_cast<const T*>(job.lora_A) + r * in;
    for (int64_t m = 0; m < job.rows; ++m) {
      const T* x = static_cast<const T*>(job.x) + m * in;
      F sum[4] = {zero(), zero(), zero(), zero()};
      for (int64_t k = 0; k < in; k += GRANULE) {
        for (int v = 0; v < GRANULE / LANES; ++v) {
          sum[v % 4] = fma(load(a + k + v * LANES), load(x + k + v * LANES), sum[v % 4]);
        }
      }
      const F total[4] = {add(add(sum[0], sum[1]), add(sum[2], sum[3])), zero(), zero(), zero()};
      float sums[4 * GROUP];
      sum_groups(total, sums);
      job.t[m * job.rank + r] = GROUP == 1 ? sums[0] : sums[0] + sums[1];
    }
  }
}

// y[m][n] of M rows and GROUP · G columns from n; `x` reordered so that nibble j of eight dwords meets eight values.
template <int M, int G, typename T>
void few_columns(const Forward& job, const float* x, const float* t, int64_t n, int64_t columns) {
  const Weight& w = job.weight;
  const int64_t in = w.in, last = w.out - 1;
  const Table table = load_table(w.code);
  const uint8_t* packed[G * GROUP];
  int64_t block[G * GROUP];
  for (int g = 0; g < G * GROUP; ++g) {
    const int64_t row = smaller(n + g, last);
    packed[g] = w.packed + row * in / 2;
    block[g] = (row * in) >> w.log2_blocksize;
  }
  const bool whole = in % (int64_t{1} << w.log2_blocksize) == 0;  // blocks do not cross rows
  const int64_t ahead = G * GROUP * in;  // bytes to the columns after the next, which are called into the second cache
  constexpr int SUMS = (M * G + 3) / 4 * 4;
  // For few rows the sum over a granule is scaled; for more, which would need twice the registers, each value is.
  constexpr bool EARLY = M > 4;
  F sum[SUMS];
  for (int i = 0; i < SUMS; ++i) sum[i] = zero();
  for (int64_t k = 0; k < in; k += GRANULE) {
    I codes[G];
    F scale[G], part[G][M];
    for (int g = 0; g < G; ++g) {
      const int a = g * GROUP, b = a + GROUP - 1;
      codes[g] = load_rows(packed[a] + k / 2, packed[b] + k / 2);
      if (k % LINE == 0) {
        __builtin_prefetch(packed[a] + k / 2 + ahead, 0, 2);
        if (GROUP > 1) __builtin_prefetch(packed[b] + k / 2 + ahead, 0, 2);
      }
      const int64_t block_a = whole ? block[a] + (k >> w.log2_blocksize)
                                    : (smaller(n + a, last) * in + k) >> w.log2_blocksize;
      const int64_t block_b = whole ? block[b] + (k >> w.log2_blocksize)
                                    : (smaller(n + b, last) * in + k) >> w.log2_blocksize;
      scale[g] = set_rows(w.scale(block_a), w.scale(block_b));
    }
    for (int j = 0; j < 8; ++j) {
      F value[G];
      for (int g = 0; g < G; ++g) {
        value[g] = lookup(table, j == 0 ? codes[g] : shift_right(codes[g], 4 * j));
        if (EARLY) value[g] = mul(value[g], scale[g]);
      }
      for (int m = 0; m < M; ++m) {
        const F xs = load_repeated(x + m * in + k + 8 * j);
        for (int g = 0; g < G; ++g) {
          if (EARLY) {
            sum[m * G + g] = fma(value[g], xs, sum[m * G + g]);
          } else {
            part[g][m] = j == 0 ? mul(value[g], xs) : fma(value[g], xs, part[g][m]);
          }
        }
      }
    }
    for (int g = 0; g < G && !EARLY; ++g) {
      for (int m = 0; m < M; ++m) sum[m * G + g] = fma(part[g][m], scale[g], sum[m * G + g]);
    }
  }
  const auto* lora_B = static_cast<const T*>(job.lora_B);
  int ranks = 0;  // that were added as vectors
  for (; ranks + 8 <= job.rank; ranks += 8) {
    for (int g = 0; g < G; ++g) {
      const int64_t a = smaller(n + g * GROUP, last), b = smaller(n + g * GROUP + GROUP - 1, last);
      const F values = load_eights(lora_B + a * job.rank + ranks, lora_B + b * job.rank + ranks);
      for (int m = 0; m < M; ++m) {
        sum[m * G + g] = fma(values, load_repeated(t + m * job.rank + ranks), sum[m * G + g]);
      }
    }
  }
  float sums[SUMS * GROUP];
  for (int i = 0; i < SUMS; i += 4) sum_groups(sum + i, sums + i * GROUP);
  const auto* bias = static_cast<const T*>(job.bias);
  for (int m = 0; m < M; ++m) {
    T* y = static_cast<T*>(job.y) + m * w.out + n;
    for (int64_t i = 0; i < columns; ++i) {
      float value = sums[m * G * GROUP + i];
      for (int r = ranks; r < job.rank; ++r) value += one(lora_B + (n + i) * job.rank + r) * t[m * job.rank + r];
      put(y + i, bias == nullptr ? value : value + one(bias + n + i));
    }
  }
}

template <int M, typename T>
void few_rows(const Forward& job, const float* x, const float* t, int64_t first_column, int64_t last_column) {
  constexpr int G = M == 1 ? 4 : 2;
  for (int64_t n = first_column; n < last_column; n += G * GROUP) {
    few_columns<M, G, T>(job, x, t, n, smaller(G * GROUP, last_column - n));
  }
}

// to[8 * j + i] = from[8 * i + (j ^ 1)]: nibble j of dword i belongs to step j ^ 1.
template <typename T>
inline void reorder(const T* from, float* to) {
  if constexpr (sizeof(T) == 4) {
    I v[8];
    for (int i = 0; i < 8; ++i) v[i] = HARLORA_F2I(load_repeated(from + 8 * i));
    transpose8(v);
    for (int j = 0; j < 8; ++j) store_eight(to + 8 * (j ^ 1), HARLORA_I2F(v[j]));
  } else {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) to[8 * (j ^ 1) + i] = one(from + 8 * i + j);
    }
  }
}

#if defined(HARLORA_BYTES)
// y[m][n + g] of M rows and G columns, `columns` of which are to be written; x and its scales as X::arrange left them.
template <int M, int G, typename X, typename T>
HARLORA_BYTES void few_columns_of_lines(const Forward& job, const uint8_t* x, const float* x_scale, const float* t,
                                        int64_t n, int64_t columns) {
  const Weight& w = job.weight;
  const int64_t in = w.in, last = w.out - 1;
  const I table = X::table(w.code);
  alignas(64) static constexpr uint8_t nothing[32] = {};
  constexpr int SUMS = (M * G + 3) / 4 * 4;
  F sum[SUMS];
  for (int i = 0; i < SUMS; ++i) sum[i] = zero();
  for (int64_t k = 0; k < in; k += CODES) {
    const bool whole = GROUP > 1 && k + kBlock < in;  // or half a line
    I codes[G][X::VECTORS], start[G];
    F scale[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const int64_t code = smaller(n + g, last) * in + k;
      const uint8_t* from = w.packed + code / 2;
      const float other = whole ? w.scale((code + kBlock) >> w.log2_blocksize) : 0.0f;
      scale[g] = set_rows(w.scale(code >> w.log2_blocksize), other);
      start[g] = X::decode_line(table, load_rows(from, whole ? from + kBlock / 2 : nothing), codes[g]);
      __builtin_prefetch(from + G * in, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      I line[X::VECTORS];
      for (int j = 0; j < X::VECTORS; ++j) line[j] = load_bytes(x + (m * X::VECTORS + j) * 4 * LANES);
      F scale_of_line = zero();
      if (X::SCALED) scale_of_line = set_rows(x_scale[m * GROUP], x_scale[m * GROUP + GROUP - 1]);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        typename X::Sum part = X::from_start(start[g]);
        for (int j = 0; j < X::VECTORS; ++j) part = X::dot(codes[g][j], line[j], part);
        sum[m * G + g] = X::finish(part, scale[g], scale_of_line, sum[m * G + g]);
      }
    }
    x += M * X::VECTORS * 4 * LANES;
    x_scale += M * GROUP;
  }
  const auto* lora_B = static_cast<const T*>(job.lora_B);
  int ranks = 0;  // that were added as vectors
  for (; ranks + LANES <= job.rank; ranks += LANES) {
    for (int g = 0; g < G; ++g) {
      const F factors = load(lora_B + smaller(n + g, last) * job.rank + ranks);
      for (int m = 0; m < M; ++m) sum[m * G + g] = fma(factors, load(t + m * job.rank + ranks), sum[m * G + g]);
    }
  }
  float sums[SUMS * GROUP];
  for (int i = 0; i < SUMS; i += 4) sum_groups(sum + i, sums + i * GROUP);
  const auto* bias = static_cast<const T*>(job.bias);
  for (int m = 0; m < M; ++m) {
    T* y = static_cast<T*>(job.y) + m * w.out + n;
    for (int64_t g = 0; g < columns; ++g) {
      float value = sums[(m * G + g) * GROUP];
      if (GROUP > 1) value += sums[(m * G + g) * GROUP + 1];
      for (int r = ranks; r < job.rank; ++r) value += one(lora_B + (n + g) * job.rank + r) * t[m * job.rank + r];
      put(y + g, bias == nullptr ? value : value + one(bias + n + g));
    }
  }
}

template <typename X, typename T>
void few_lines(const Forward& job, int64_t first_column, int64_t last_column) {
  constexpr int64_t LINES = FEW_VALUES / CODES + FEW;  // a row may end within one
  alignas(64) uint8_t x[LINES * X::VECTORS * 4 * LANES];
  alignas(64) float x_scale[LINES * GROUP];
  alignas(64) float t[FEW * RANKS];
  const int64_t in = job.weight.in, rows = job.rows;
  for (int64_t m = 0; m < rows; ++m) {
    X::arrange(static_cast<const T*>(job.x) + m * in, in, x + m * X::VECTORS * 4 * LANES, x_scale + m * GROUP, rows);
  }
  for (int64_t i = 0; i < rows * job.rank; ++i) t[i] = job.scaling * job.t[i];
  constexpr int G = 2;
  static constexpr decltype(&few_columns_of_lines<1, G, X, T>) of_rows[FEW] = {
      few_columns_of_lines<1, G, X, T>, few_columns_of_lines<2, G, X, T>, few_columns_of_lines<3, G, X, T>,
      few_columns_of_lines<4, G, X, T>,
#if defined(HARLORA_AVX512)
      few_columns_of_lines<5, G, X, T>, few_columns_of_lines<6, G, X, T>, few_columns_of_lines<7, G, X, T>,
      few_columns_of_lines<8, G, X, T>,
#endif
  };
  for (int64_t n = first_column; n < last_column; n += G) {
    of_rows[rows - 1](job, x, x_scale, t, n, smaller(G, last_column - n));
  }
}
#endif

template <typename T>
void forward_few_as(const Forward& job, int64_t first_column, int64_t last_column) {
#if defined(HARLORA_BYTES)
  if constexpr (sizeof(T) == 4) {
    if (job.precision == Precision::int8) return few_lines<ByteRows, T>(job, first_column, last_column);
  }
#endif
#if defined(HARLORA_BF16)
  if (job.precision == Precision::bfloat16) {
    if constexpr (sizeof(T) == 4) return few_lines<PairRows, float>(job, first_column, last_column);
    return few_lines<PairRows, BFloat16>(job, first_column, last_column);
  }
#endif
  alignas(64) float x[FEW_VALUES];
  alignas(64) float t[FEW * RANKS];
  const int64_t in = job.weight.in, rows = job.rows;
  const auto* from = static_cast<const T*>(job.x);
  for (int64_t k = 0; k < rows * in; k += GRANULE) reorder(from + k, x + k);
  for (int64_t i = 0; i < rows * job.rank; ++i) t[i] = job.scaling * job.t[i];
  switch (rows) {
    case 1: return few_rows<1, T>(job, x, t, first_column, last_column);
    case 2: return few_rows<2, T>(job, x, t, first_column, last_column);
    case 3: return few_rows<3, T>(job, x, t, first_column, last_column);
    case 4: return few_rows<4, T>(job, x, t, first_column, last_column);
#if defined(HARLORA_AVX512)
    case 5: return few_rows<5, T>(job, x, t, first_column, last_column);
    case 6: return few_rows<6, T>(job, x, t, first_column, last_column);
    case 7: return few_rows<7, T>(job, x, t, first_column, last_column);
    case 8: return few_rows<8, T>(job, x, t, first_column, last_column);
#endif
    default: return;
  }
}

// Backward ----------------------------------------------------------------------------------------------------------

template <typename T>
void backward_u_as(const Backward& job, int64_t first_row, int64_t last_row) {
  const auto* lora_B = static_cast<const T*>(job.lora_B);
  const int64_t out = job.weight.out;
  multiply_thin(static_cast<const T*>(job.grad), out, out, job.rank, first_row, last_row, job.u,
                [&](int64_t step, int64_t steps, int first, int width, float* to) {
                  const int64_t columns = smaller(width, job.rank - first);
                  for (int64_t i = 0; i < steps; ++i) {
                    widen(lora_B + (step + i) * job.rank + first, columns, width, to + i * width);
                    for (int v = 0; v < width; v += LANES) {
                      store(to + i * width + v, mul(load(to + i * width + v), set(job.scaling)));
                    }
                  }
                });
}

template <typename T>
void backward_x_as(const Backward& job, int64_t first_panel, int64_t last_panel, int64_t first_row,
                   int64_t last_row) {
  alignas(64) float panel[DEPTH * PANEL];
  alignas(64) float block[ROW_BLOCK * PANEL];
  alignas(64) float packed_a[PACKED_A];
  alignas(64) float branch[RANKS * PANEL];
  const auto* grad = static_cast<const T*>(job.grad);
  const auto* lora_A = static_cast<const T*>(job.lora_A);
  const int64_t in = job.weight.in, out = job.weight.out;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t k = p * PANEL, columns = smaller(PANEL, in - k);
    for (int64_t m = first_row; m < last_row; m += ROW_BLOCK) {
      const int64_t rows = smaller(ROW_BLOCK, last_row - m);
      for (int64_t step = 0; step == 0 || step < out; step += job.depth) {
        const int64_t steps = smaller(job.depth, out - step);
        if (out > job.depth || m == first_row) decode_straight(job.weight, k, step, steps, panel);
        multiply<2>(rows, steps, grad + m * out + step, out, panel, step == 0 ? zeros : block, step == 0 ? 0 : PANEL,
                    block, PANEL, packed_a);
      }
      for (int first = 0; first < job.rank; first += RANKS) {
        const int64_t ranks = smaller(RANKS, job.rank - first);
        if (job.rank > RANKS || m == first_row) {
          for (int64_t i = 0; i < ranks; ++i) {
            for (int column = 0; column < PANEL; ++column) {
              const bool inside = column < columns;
              branch[i * PANEL + permuted(column)] = inside ? one(lora_A + (first + i) * in + k + column) : 0.0f;
            }
          }
        }
        multiply<2>(rows, ranks, job.u + m * job.rank + first, job.rank, branch, block, PANEL, block, PANEL, packed_a);
      }
      for (int64_t i = 0; i < rows; ++i) {
        F first, second;
        interleave(load(block + i * PANEL), load(block + i * PANEL + LANES), &first, &second);
        T* to = static_cast<T*>(job.grad_x) + (m + i) * in + k;
        if (job.add_x) {
          alignas(64) float before[PANEL];
          widen(to, columns, PANEL, before);
          first = add(first, load(before));
          second = add(second, load(before + LANES));
        }
        if (columns == PANEL) {
          store(to, first);
          store(to + LANES, second);
        } else {
          alignas(64) float row[PANEL];
          store(row, first);
          store(row + LANES, second);
          narrow(row, columns, to);
        }
      }
    }
  }
}

template <typename T>
void backward_A_as(const Backward& job, int64_t first_panel, int64_t last_panel) {
  alignas(64) float block[RANKS * PANEL];
  const int64_t in = job.weight.in;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t k = p * PANEL, columns = smaller(PANEL, in - k);
    for (int first = 0; first < job.rank; first += RANKS) {
      const int64_t ranks = smaller(RANKS, job.rank - first);
      multiply_over_rows(job.rows, job.u + first, job.rank, ranks, static_cast<const T*>(job.x) + k, in, columns,
                         block);
      for (int64_t r = 0; r < ranks; ++r) {
        narrow(block + r * PANEL, columns, static_cast<T*>(job.grad_A) + (first + r) * in + k);
      }
    }
  }
}

template <typename T>
void backward_B_as(const Backward& job, int64_t first_panel, int64_t last_panel) {
  alignas(64) float block[RANKS * PANEL];
  alignas(64) float row[PANEL];
  const int64_t out = job.weight.out;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t n = p * PANEL, columns = smaller(PANEL, out - n);
    const T* grad = static_cast<const T*>(job.grad) + n;
    for (int first = 0; job.grad_B != nullptr && first < job.rank; first += RANKS) {
      const int64_t ranks = smaller(RANKS, job.rank - first);
      multiply_over_rows(job.rows, job.t + first, job.rank, ranks, grad, out, columns, block);
      for (int64_t i = 0; i < columns; ++i) {
        for (int64_t r = 0; r < ranks; ++r) {
          put(static_cast<T*>(job.grad_B) + (n + i) * job.rank + first + r, job.scaling * block[r * PANEL + i]);
        }
      }
    }
    if (job.grad_bias != nullptr) {
      F sum[2] = {zero(), zero()};
      for (int64_t m = 0; m < job.rows; ++m) {
        widen(grad + m * out, columns, PANEL, row);
        for (int v = 0; v < 2; ++v) sum[v] = add(sum[v], load(row + v * LANES));
      }
      for (int v = 0; v < 2; ++v) store(row + v * LANES, sum[v]);
      narrow(row, columns, static_cast<T*>(job.grad_bias) + n);
    }
  }
}

// By dtype ----------------------------------------------------------------------------------------------------------

#define HARLORA_BY_DTYPE(function, job, ...)                                               \
  if (job.dtype == Dtype::float32) return function##_as<float>(job, __VA_ARGS__);          \
  if (job.dtype == Dtype::bfloat16) return function##_as<BFloat16>(job, __VA_ARGS__);      \
  return function##_as<Half>(job, __VA_ARGS__)

void forward_t(const Forward& job, int64_t first, int64_t last) { HARLORA_BY_DTYPE(forward_t, job, first, last); }
void forward(const Forward& job, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row) {
  HARLORA_BY_DTYPE(forward, job, first_panel, last_panel, first_row, last_row);
}
void forward_few_t(const Forward& job, int64_t first, int64_t last) {
  HARLORA_BY_DTYPE(forward_few_t, job, first, last);
}
void forward_few(const Forward& job, int64_t first, int64_t last) { HARLORA_BY_DTYPE(forward_few, job, first, last); }
void backward_u(const Backward& job, int64_t first, int64_t last) { HARLORA_BY_DTYPE(backward_u, job, first, last); }
void backward_x(const Backward& job, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row) {
  HARLORA_BY_DTYPE(backward_x, job, first_panel, last_panel, first_row, last_row);
}
void backward_A(const Backward& job, int64_t first, int64_t last) { HARLORA_BY_DTYPE(backward_A, job, first, last); }
void backward_B(const Backward& job, int64_t first, int64_t last) { HARLORA_BY_DTYPE(backward_B, job, first, last); }

constexpr Kernels make_kernels(const char* name) {
  return {
      .name = name,
      .panel = PANEL,
      .depth = DEPTH,
#if defined(HARLORA_BF16)
      .pairs = true,
#else
      .pairs = false,
#endif
#if defined(HARLORA_BYTES)
      .round_to_bytes = round_to_bytes,
#else
      .round_to_bytes = nullptr,
#endif
      .attention_scratch = attention_scratch,
      .few_columns = 4 * GROUP,
      .narrow = narrow_to,
      .quantize = quantize,
      .dequantize = dequantize,
      .forward_t = forward_t,
      .forward = forward,
      .forward_few_serves = forward_few_serves,
      .forward_few_t = forward_few_t,
      .forward_few = forward_few,
      .layer_norm = layer_norm,
      .gelu = gelu_of,
      .gelu_backward = gelu_backward,
      .attention = attention,
      .attention_backward = attention_backward,
      .backward_u = backward_u,
      .backward_x = backward_x,
      .backward_A = backward_A,
      .backward_B = backward_B,
  };
}
