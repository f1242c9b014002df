#pragma once

#include <cstdint>

// The boundary between tensors (operators.cpp, compiled once) and arithmetic (kernels.inl,
// compiled for every instruction set). Everything here is plain memory: contiguous, row by row.

namespace harlora::cpu {

enum class Dtype : int { float32, bfloat16, float16 };

// What the factors of a base product are rounded to.
enum class Precision : int { float32, bfloat16, int8 };

// Bit patterns; kernels compute in float32 and round once, to nearest even, when they store.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// x in 8 bits, by blocks of kBlock values: x ≈ 127 · scale · (values - 128). Of each eight the even values come first.
struct Bytes {
  uint8_t* values;
  float* scale;  // (blocks); a weight's bytes are its codes' values times 127, hence that factor
};
constexpr int64_t kBlock = 64;

// A weight of (out, in) in 4 bits; format as in kernels/format.py. Or, inside whole blocks, a dense one.
struct Weight {
  const float* dense;  // (out, in), or null
  const uint8_t* packed;
  const float* absmax;          // (blocks), or null when double quantised
  const uint8_t* absmax_code;   // (blocks), or null
  const float* nested_absmax;   // (ceil(blocks / 256))
  const float* nested_code;     // (256)
  float nested_offset;
  const float* code;            // (16)
  int log2_blocksize;
  int64_t out, in;

  float scale(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    const float product = nested_code[absmax_code[block]] * nested_absmax[block >> 8];
    return product + nested_offset;
  }
  const void* place_of_scale(int64_t block) const {
    return absmax != nullptr ? static_cast<const void*>(absmax + block) : absmax_code + block;
  }
};

// y = x·Ŵᵀ + bias + scaling·t·lora_Bᵀ. Pointers of `dtype` unless typed.
struct Forward {
  Weight weight;
  Dtype dtype;
  int64_t rows;
  int rank;  // 0: no adapter
  float scaling;
  const void* x;       // (rows, in)
  const void* bias;    // (out), or null
  const void* lora_A;  // (rank, in)
  const void* lora_B;  // (out, rank)
  Precision precision; // of the base product
  const BFloat16* x16; // (rows, in), x in bfloat16, where that is the precision and the dtype is another
  Bytes x8;            // (rows, in), x in 8 bits, where that is the precision
  int64_t depth;       // steps decoded at a time: a multiple of 64, at most Kernels::depth
  float* t;            // (rows, rank)
  void* y;             // (rows, out)
  // What follows the product, in float32 alone: y = residual + gelu(product), each if asked for.
  bool gelu;
  const float* residual;  // (rows, out), or null; may be y itself
};

// With u = scaling·dY·lora_B: dX = dY·Ŵ + u·lora_A, dbias = Σ dY, dA = uᵀ·x, dB = scaling·dYᵀ·t; null: not wanted.
struct Backward {
  Weight weight;
  Dtype dtype;
  int64_t rows;
  int rank;
  float scaling;
  const void* grad;    // (rows, out)
  const void* x;       // (rows, in), for dA
  const float* t;      // (rows, rank), for dB
  const void* lora_A;
  const void* lora_B;
  int64_t depth;       // as in Forward
  float* u;            // (rows, rank)
  void* grad_x;
  bool add_x;          // grad_x += dX, for several layers over one x
  void* grad_bias;
  void* grad_A;
  void* grad_B;
};

// One instruction set's arithmetic. Every function works on a range, so that the caller shares the work out; a result
// does not depend on how.
struct Kernels {
  const char* name;
  int panel;        // columns of a panel: of y in forward, of dX and dA (in), dB and dbias (out) in backward
  int64_t depth;
  // x16 and x8 are served where `in` is a multiple of kBlock and blocks are no smaller.
  bool pairs;
  // Makes x8 of n values. Null: x8 is not served, as on processors without products of bytes.
  void (*round_to_bytes)(const float* x, int64_t n, const Bytes& to);
  int64_t (*attention_scratch)(int64_t tokens, int64_t width, int64_t heads);  // floats
  int few_columns;  // forward_few takes ranges of columns that start at a multiple of this

  void (*narrow)(const float* from, int64_t n, Dtype dtype, void* to);
  void (*quantize)(const void* weight, Dtype dtype, int64_t n, bool fp4, const float* bounds, int log2_blocksize,
                   int64_t first_block, int64_t last_block, uint8_t* packed, float* absmax);
  void (*dequantize)(const Weight& weight, int64_t n, int64_t first_block, int64_t last_block, Dtype dtype, void* out);

  void (*forward_t)(const Forward& job, int64_t first_row, int64_t last_row);
  void (*forward)(const Forward& job, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t last_row);
  bool (*forward_few_serves)(const Forward& job);
  void (*forward_few_t)(const Forward& job, int64_t first_rank, int64_t last_rank);
  void (*forward_few)(const Forward& job, int64_t first_column, int64_t last_column);

  // Of rows of `width`: (x - mean) / sqrt(variance + eps) * gain + bias.
  void (*layer_norm)(const float* x, int64_t rows, int64_t width, const float* gain, const float* bias, float eps,
                     float* y);
  void (*gelu)(const float* x, int64_t n, float* y);
  // grad = grad · gelu'(x).
  void (*gelu_backward)(const float* x, int64_t n, float* grad);
  // softmax(q·kᵀ / sqrt(size of a head))·v for heads [first, last), counted through all windows; q, k, v and y are
  // (windows, tokens, width), the values of one head side by side.
  void (*attention)(const float* q, const float* k, const float* v, int64_t tokens, int64_t width, int64_t heads,
                    int64_t first, int64_t last, float* scratch, float* y);
  void (*attention_backward)(const float* grad, const float* q, const float* k, const float* v, int64_t tokens,
                             int64_t width, int64_t heads, int64_t first, int64_t last, float* scratch, float* grad_q,
                             float* grad_k, float* grad_v);

  void (*backward_u)(const Backward& job, int64_t first_row, int64_t last_row);
  void (*backward_x)(const Backward& job, int64_t first_panel, int64_t last_panel, int64_t first_row,
                     int64_t last_row);
  void (*backward_A)(const Backward& job, int64_t first_panel, int64_t last_panel);
  void (*backward_B)(const Backward& job, int64_t first_panel, int64_t last_panel);  // and dbias
};

extern const Kernels portable_kernels;
#ifdef HARLORA_X86
extern const Kernels avx2_kernels, avx512_kernels, avx512bf16_kernels;
#endif

}  // namespace harlora::cpu
