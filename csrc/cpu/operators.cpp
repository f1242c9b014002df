// Tensors in, tensors out: checks, allocation, and how work is shared out. The arithmetic is in kernels.inl.

#include "operators.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace harlora::cpu {
namespace {

using torch::headeronly::ScalarType;

Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// The memory of a contiguous tensor of `numel` values of one type; raises if it is another.
const void* memory(const char* name, const Tensor& tensor, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type, name, " has the wrong device or dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " values, got ", tensor.numel());
  return tensor.const_data_ptr();
}

const void* memory(const char* name, const Optional& tensor, ScalarType type, int64_t numel) {
  return tensor.has_value() ? memory(name, *tensor, type, numel) : nullptr;
}

void* writable(const char* name, const Optional& tensor, ScalarType type, int64_t numel) {
  return const_cast<void*>(memory(name, tensor, type, numel));
}

// As empty_strided, without the dispatcher: at HAR size every microsecond shows.
Tensor empty(int32_t dtype, const int64_t* sizes, int64_t dim) {
  int64_t strides[64];
  STD_TORCH_CHECK(dim <= 64, "at most 64 dimensions");
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dim) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(dtype, sizes, dim);
}

Weight weight_of(const Tensor& packed, const Tensor& absmax, const Optional& nested_absmax,
                 const Optional& nested_offset, const Optional& nested_code, const Tensor& code, int64_t blocksize,
                 int64_t out, int64_t in) {
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0 && out >= 0 && in >= 0,
                  "blocksize must be a power of two of at least 32, got ", blocksize);
  const int64_t numel = out * in, blocks = (numel + blocksize - 1) / blocksize;
  Weight w{};
  w.packed = static_cast<const uint8_t*>(memory("packed", packed, ScalarType::Byte, (numel + 1) / 2));
  w.code = static_cast<const float*>(memory("code", code, ScalarType::Float, 16));
  w.out = out;
  w.in = in;
  while (int64_t{1} << w.log2_blocksize < blocksize) ++w.log2_blocksize;
  if (nested_absmax.has_value()) {
    STD_TORCH_CHECK(nested_offset.has_value() && nested_code.has_value(), "nested tensors come together");
    w.absmax_code = static_cast<const uint8_t*>(memory("absmax", absmax, ScalarType::Byte, blocks));
    w.nested_absmax =
        static_cast<const float*>(memory("nested_absmax", *nested_absmax, ScalarType::Float, (blocks + 255) / 256));
    w.nested_offset = *static_cast<const float*>(memory("nested_offset", *nested_offset, ScalarType::Float, 1));
    w.nested_code = static_cast<const float*>(memory("nested_code", *nested_code, ScalarType::Float, 256));
  } else {
    w.absmax = static_cast<const float*>(memory("absmax", absmax, ScalarType::Float, blocks));
  }
  return w;
}

void make_contiguous(Optional& tensor) {
  if (tensor.has_value() && !tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
}

// The rank of an adapter, after checking shapes: as many values in another shape would be read as if they fitted.
int rank_of(const Optional& lora_A, const Optional& lora_B, int64_t in, int64_t out) {
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B come together");
  if (!lora_A.has_value()) return 0;
  STD_TORCH_CHECK(lora_A->dim() == 2 && lora_A->size(1) == in, "lora_A must be (rank, ", in, ")");
  const int64_t rank = lora_A->size(0);
  STD_TORCH_CHECK(lora_B->dim() == 2 && lora_B->size(0) == out && lora_B->size(1) == rank, "lora_B must be (", out, ", ",
                  rank, ")");
  return static_cast<int>(rank);
}

// Working memory in float32: the caller's where it has that dtype, else of its own. That comes from torch's allocator, so
// that what a training step needs is seen there. Made before work is shared out: allocations of other threads are not.
class Scratch {
 public:
  explicit Scratch(int64_t numel, void* given = nullptr) {
    if (given != nullptr) {
      data_ = static_cast<float*>(given);
    } else if (numel <= kInline) {
      data_ = inline_;
    } else {
      owned_ = empty(aoti_torch_dtype_float32(), &numel, 1);
      data_ = static_cast<float*>(owned_->mutable_data_ptr());
    }
  }
  float* data() { return data_; }

 private:
  static constexpr int64_t kInline = 1024;
  float inline_[kInline];
  Optional owned_;
  float* data_;
};

constexpr int64_t kRowsOfChunk = 128;
constexpr int64_t kWorkOfRounding = 8;  // multiply-adds that take as long as rounding a value of x

// Steps that each thread decodes at a time, so that all of them together hold at most 1 MiB of decoded weight (up to
// 128 threads).
int64_t depth_of(const Kernels& k, int64_t rows) {
  const int64_t all = (int64_t{1} << 20) / (static_cast<int64_t>(sizeof(float)) * k.panel);
  // With few rows decoding is most of the work, and faster into a panel that fits the first-level cache.
  const int64_t granules = std::max<int64_t>(1, all / torch::stable::get_num_threads() / 64);
  return std::min(rows < 32 ? k.depth / 2 : k.depth, granules * 64);
}

// Rows of one pass over all panels: as many as stay in a second-level cache with their share of y.
int64_t rows_of_pass(int64_t depth) { return std::max<int64_t>(96, (int64_t{1} << 19) / std::max<int64_t>(depth, 1)); }

// f(first_panel, last_panel, first_row, last_row) over the grid of panels and rows.
template <typename F>
void over_grid(int64_t part, int64_t parts, int64_t panels, int64_t rows, int64_t pass, const F& f) {
  // Rows are split too where there are fewer panels than threads; each part decodes its own copy of a panel then.
  int64_t row_parts = 1;
  while (row_parts < parts && panels * row_parts % parts != 0 && panels * row_parts < 4 * parts) ++row_parts;
  const int64_t cells = panels * row_parts;
  const int64_t first = cells * part / parts, last = cells * (part + 1) / parts;
  for (int64_t cell = first; cell < last;) {
    const int64_t row_part = cell / panels, panel = cell % panels;
    const int64_t stop = std::min(panels, panel + last - cell);
    const int64_t first_row = rows * row_part / row_parts, last_row = rows * (row_part + 1) / row_parts;
    for (int64_t row = first_row; row < last_row; row += pass) {
      f(panel, stop, row, std::min(last_row, row + pass));
    }
    cell += stop - panel;
  }
}

// From this in_features on few rows are multiplied line by line in fewer bits as well: shorter ones would be over before
// the sums' lanes are added up. Up to two of those are as fast in float32.
constexpr int64_t kLongRow = 1024;

// What the factors of a layer's base product are rounded to; float32 where the kernels do not serve what is asked.
Precision precision_of(const Kernels& k, const Forward& job, Precision asked) {
  if (job.weight.dense != nullptr || job.weight.in == 0) return Precision::float32;
  if (job.dtype == Dtype::bfloat16) asked = Precision::bfloat16;
  const bool serves = job.dtype != Dtype::float16 && has(k, asked) && job.weight.in % kBlock == 0 &&
                      int64_t{1} << job.weight.log2_blocksize >= kBlock;
  const bool pays = job.rows > 2 || job.weight.in >= kLongRow;
  return serves && pays ? asked : Precision::float32;
}

Precision precision_from(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= static_cast<int64_t>(Precision::int8), "precision is none of those there are");
  return static_cast<Precision>(value);
}

// Copies of float32 x in fewer bits, of some rows at a time.
class Rounded {
 public:
  Rounded(int64_t numel, bool pairs, bool bytes) {
    if (pairs) pairs_.reset(new BFloat16[static_cast<size_t>(numel)]);
    if (!bytes) return;
    const size_t blocks = static_cast<size_t>(numel / kBlock);
    values_.reset(new uint8_t[static_cast<size_t>(numel)]);
    scale_.reset(new float[blocks]);
  }
  // Of values from `first` on; n is a multiple of kBlock if there are bytes.
  void round(const Kernels& k, const float* x, int64_t first, int64_t n) {
    if (pairs_) k.narrow(x, n, Dtype::bfloat16, pairs_.get() + first);
    if (!values_) return;
    const int64_t block = first / kBlock;
    k.round_to_bytes(x, n, {values_.get() + first, scale_.get() + block});
  }
  const BFloat16* pairs() const { return pairs_.get(); }
  Bytes bytes() const { return {values_.get(), scale_.get()}; }

 private:
  std::unique_ptr<BFloat16[]> pairs_;
  std::unique_ptr<uint8_t[]> values_;
  std::unique_ptr<float[]> scale_;
};

// Linear layers over the same x, from memory to memory; on one thread alone unless `threads`. One round of threads
// computes all t and rounds x, a second one computes all y.
void forward(const Kernels& k, Forward* jobs, int count, bool threads, Precision asked) {
  const int64_t rows = jobs[0].rows, in = jobs[0].weight.in;
  int64_t branch = 0, work = 0;
  bool few = true, pairs = false, bytes = false;
  for (int i = 0; i < count; ++i) {
    branch += 2 * rows * in * jobs[i].rank;  // thin products run at half the rate
    work += rows * in * jobs[i].weight.out + 2 * in * jobs[i].weight.out;  // decoding counts as two multiply-adds
    jobs[i].precision = precision_of(k, jobs[i], asked);
    few = few && k.forward_few_serves(jobs[i]) && (jobs[i].precision == Precision::float32 || in >= kLongRow);
    pairs = pairs || jobs[i].precision == Precision::bfloat16;
    bytes = bytes || jobs[i].precision == Precision::int8;
    jobs[i].depth = depth_of(k, rows);
  }
  // Of reduced products over float32, a copy of at most 1 MiB of x at a time.
  const bool round = (pairs || bytes) && jobs[0].dtype == Dtype::float32 && !few;
  const int64_t most = round ? std::min(rows, std::max<int64_t>(96, (int64_t{1} << 19) / in)) : rows;
  Rounded rounded(most * in, round && pairs, round && bytes);
  if (round) branch += kWorkOfRounding * rows * in;
  if (!threads) branch = work = 0;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t some = std::min(most, rows - row);
    in_parts(branch / rows * some, [&](int64_t part, int64_t parts) {
      const int64_t first = share(some, part, parts), last = share(some, part + 1, parts);
      for (int i = 0; i < count; ++i) {
        if (jobs[i].rank == 0) continue;
        if (few) {
          k.forward_few_t(jobs[i], share(jobs[i].rank, part, parts), share(jobs[i].rank, part + 1, parts));
        } else {
          k.forward_t(jobs[i], row + first, row + last);
        }
      }
      if (round) {
        rounded.round(k, static_cast<const float*>(jobs[0].x) + (row + first) * in, first * in, (last - first) * in);
      }
    });
    in_parts(work / rows * some, [&](int64_t part, int64_t parts) {
      for (int i = 0; i < count; ++i) {
        Forward job = jobs[i];
        const int64_t out = job.weight.out;
        if (few) {
          k.forward_few(job, share(out, part, parts, k.few_columns), share(out, part + 1, parts, k.few_columns));
          continue;
        }
        if (round) {
          job.x16 = rounded.pairs();
          job.x8 = rounded.bytes();
          job.rows = some;
          job.x = static_cast<const float*>(job.x) + row * in;
          job.y = static_cast<float*>(job.y) + row * out;
          job.t += row * job.rank;
          if (job.residual != nullptr) job.residual += row * out;
        }
        over_grid(part, parts, (out + k.panel - 1) / k.panel, job.rows, rows_of_pass(in),
                  [&](int64_t p0, int64_t p1, int64_t m0, int64_t m1) { k.forward(job, p0, p1, m0, m1); });
      }
    });
  }
}

// Gradients of linear layers, from memory to memory; of layers that add to one grad_x, rows and `in` are the same. One
// round of threads computes all u that are needed (`has_u`: they are there), a second one the rest.
void backward(const Kernels& k, Backward* jobs, int count, bool has_u = false) {
  int64_t branch = 0, work = 0;
  const auto wants_u = [](const Backward& job) {
    return job.rank > 0 && (job.grad_x != nullptr || job.grad_A != nullptr);
  };
  for (int i = 0; i < count; ++i) {
    Backward& job = jobs[i];
    const int64_t rows = job.rows, in = job.weight.in, out = job.weight.out;
    job.depth = depth_of(k, rows);
    if (!has_u && wants_u(job)) branch += rows * out * job.rank;
    work += (job.grad_x != nullptr ? rows * in * out + 2 * in * out : 0) +
            (job.grad_A != nullptr ? rows * in * job.rank : 0) + (job.grad_B != nullptr ? rows * out * job.rank : 0) +
            (job.grad_bias != nullptr ? rows * out : 0);
  }
  if (!has_u) {
    in_parts(branch, [&](int64_t part, int64_t parts) {
      for (int i = 0; i < count; ++i) {
        if (!wants_u(jobs[i])) continue;
        k.backward_u(jobs[i], share(jobs[i].rows, part, parts), share(jobs[i].rows, part + 1, parts));
      }
    });
  }
  in_parts(work, [&](int64_t part, int64_t parts) {
    for (int i = 0; i < count; ++i) {
      const Backward& job = jobs[i];
      const int64_t in_panels = (job.weight.in + k.panel - 1) / k.panel;
      const int64_t out_panels = (job.weight.out + k.panel - 1) / k.panel;
      if (job.grad_x != nullptr) {
        over_grid(part, parts, in_panels, job.rows, rows_of_pass(job.weight.out),
                  [&](int64_t p0, int64_t p1, int64_t m0, int64_t m1) { k.backward_x(job, p0, p1, m0, m1); });
      }
      if (job.grad_A != nullptr) {
        k.backward_A(job, share(in_panels, part, parts), share(in_panels, part + 1, parts));
      }
      if (job.grad_B != nullptr || job.grad_bias != nullptr) {
        // The remainder of dA and dB fall to different threads.
        const int64_t other = parts - 1 - part;
        k.backward_B(job, share(out_panels, other, parts), share(out_panels, other + 1, parts));
      }
    }
  });
}

// The layers of an encoder as harlora/models/whole.py lists them: tensors, what they are, and their constants.
struct Description {
  std::vector<Tensor> tensors;
  std::vector<int64_t> facts;
  std::vector<double> factors;
};

std::mutex descriptions_lock;
std::unordered_map<int64_t, std::shared_ptr<const Description>> descriptions;
int64_t last_description = 0;

// Reads a description from its beginning to its end.
class Layers {
 public:
  explicit Layers(const Description& d) : tensors_(d.tensors), facts_(d.facts), factors_(d.factors) {}

  int64_t fact() {
    STD_TORCH_CHECK(fact_ < facts_.size(), "encoder: facts end too early");
    return facts_[fact_++];
  }
  float factor() {
    STD_TORCH_CHECK(factor_ < factors_.size(), "encoder: factors end too early");
    return static_cast<float>(factors_[factor_++]);
  }
  const Tensor& tensor() {
    STD_TORCH_CHECK(tensor_ < tensors_.size(), "encoder: tensors end too early");
    return tensors_[tensor_++];
  }
  const float* floats(const char* name, int64_t numel) {
    return static_cast<const float*>(memory(name, tensor(), ScalarType::Float, numel));
  }
  bool done() const {
    return tensor_ == tensors_.size() && fact_ == facts_.size() && factor_ == factors_.size();
  }

  // facts: blocksize (0: dense), nested, bias, rank; tensors: weight, or packed, absmax, code and the nested ones;
  // bias; lora_A, lora_B; factors: scaling of an adapter.
  Forward linear(int64_t in, int64_t out) {
    Forward job{};
    const int64_t blocksize = fact(), nested = fact(), bias = fact(), rank = fact();
    STD_TORCH_CHECK(rank >= 0 && rank <= std::numeric_limits<int>::max(), "encoder: rank is wrong");
    if (blocksize == 0) {
      job.weight.out = out;
      job.weight.in = in;
      job.weight.dense = floats("weight", out * in);
    } else {
      const Tensor &packed = tensor(), &absmax = tensor(), &code = tensor();
      Optional extra[3];
      for (int i = 0; nested != 0 && i < 3; ++i) extra[i] = tensor();
      job.weight = weight_of(packed, absmax, extra[0], extra[1], extra[2], code, blocksize, out, in);
    }
    if (bias != 0) {
      const Tensor& given = tensor();
      STD_TORCH_CHECK(given.dim() == 1, "bias must be (", out, ")");
      job.bias = static_cast<const float*>(memory("bias", given, ScalarType::Float, out));
    }
    job.rank = static_cast<int>(rank);
    if (rank > 0) {
      const Tensor &lora_A = tensor(), &lora_B = tensor();
      STD_TORCH_CHECK(rank_of(lora_A, lora_B, in, out) == rank, "encoder: rank is wrong");
      job.lora_A = static_cast<const float*>(memory("lora_A", lora_A, ScalarType::Float, rank * in));
      job.lora_B = static_cast<const float*>(memory("lora_B", lora_B, ScalarType::Float, out * rank));
      job.scaling = factor();
    }
    return job;
  }

 private:
  const std::vector<Tensor>& tensors_;
  const std::vector<int64_t>& facts_;
  const std::vector<double>& factors_;
  size_t tensor_ = 0, fact_ = 0, factor_ = 0;
};

struct Norm {
  const float* gain;
  const float* bias;
  float eps;
};

Norm norm_of(Layers& layers, int64_t width) {
  const float* gain = layers.floats("norm.weight", width);
  const float* bias = layers.floats("norm.bias", width);
  return {gain, bias, layers.factor()};
}

struct Block {
  Norm norm1, norm2;
  Forward q, k, v, o, fc1, fc2;
};

struct Encoder {
  Forward embed;
  const float* positions;
  std::vector<Block> blocks;
  Norm norm;
  int64_t tokens, width, heads, ffn, rank;

  int64_t floats_of_row() const { return 6 * width + ffn + 3 * rank; }
};

// Everything for `windows` windows of x (windows, tokens, in of embed) into y (windows, tokens, width). `scratch` has
// room for floats_of_row() floats a row, and for one attention on each thread.
void encode(const Kernels& kernels, const Encoder& e, const float* x, int64_t windows, bool threads,
            Precision precision, float* scratch, float* attention_scratch, int64_t attention_floats, float* y) {
  const int64_t rows = windows * e.tokens, width = e.width;
  float* normed = scratch;
  float* q = normed + rows * width;
  float* k = q + rows * width;
  float* v = k + rows * width;
  float* mixed = v + rows * width;
  float* state = mixed + rows * width;
  float* hidden = state + rows * width;
  float* t = hidden + rows * e.ffn;
  const auto placed = [&](Forward job, const float* from, float* to) {
    job.rows = rows;
    job.x = from;
    job.y = to;
    job.t = t;
    return job;
  };
  const auto apply = [&](const Forward& linear, const float* from, float* to, const float* residual, bool gelu) {
    Forward job = placed(linear, from, to);
    job.residual = residual;
    job.gelu = gelu;
    forward(kernels, &job, 1, threads, precision);
  };
  const auto norm = [&](const Norm& n, const float* from, float* to) {
    in_parts(threads ? 4 * rows * width : 0, [&](int64_t part, int64_t parts) {
      const int64_t first = share(rows, part, parts), last = share(rows, part + 1, parts);
      kernels.layer_norm(from + first * width, last - first, width, n.gain, n.bias, n.eps, to + first * width);
    });
  };
  apply(e.embed, x, state, nullptr, false);
  for (int64_t window = 0; window < windows; ++window) {
    for (int64_t i = 0; i < e.tokens * width; ++i) state[window * e.tokens * width + i] += e.positions[i];
  }
  for (const Block& block : e.blocks) {
    norm(block.norm1, state, normed);
    Forward qkv[3] = {placed(block.q, normed, q), placed(block.k, normed, k), placed(block.v, normed, v)};
    qkv[1].t += rows * e.rank;
    qkv[2].t += 2 * rows * e.rank;
    forward(kernels, qkv, 3, threads, precision);
    const int64_t heads = windows * e.heads;
    // Exponentials, copies and short sums: about four times the multiply-adds.
    in_parts(threads ? 8 * rows * e.tokens * width : 0, [&](int64_t part, int64_t parts) {
      kernels.attention(q, k, v, e.tokens, width, e.heads, share(heads, part, parts), share(heads, part + 1, parts),
                        attention_scratch + part * attention_floats, mixed);
    });
    apply(block.o, mixed, state, state, false);
    norm(block.norm2, state, normed);
    apply(block.fc1, normed, hidden, nullptr, true);
    apply(block.fc2, hidden, state, state, false);
  }
  norm(e.norm, state, y);
}

}  // namespace

std::string kernels_name() { return kernels().name; }

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor bounds, int64_t blocksize, bool fp4) {
  const int64_t n = weight.numel();
  const Dtype dtype = dtype_of("weight", weight.scalar_type());
  STD_TORCH_CHECK(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, "blocksize must be a power of two");
  const void* values = memory("weight", weight, weight.scalar_type(), n);
  const auto* limits = static_cast<const float*>(memory("bounds", bounds, ScalarType::Float, fp4 ? 7 : 15));
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  Tensor packed = torch::stable::empty({(n + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = torch::stable::empty({blocks}, ScalarType::Float);
  auto* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* scales = static_cast<float*>(absmax.mutable_data_ptr());
  int log2 = 0;
  while (int64_t{1} << log2 < blocksize) ++log2;
  const Kernels& k = kernels();
  in_parts(4 * n, [&](int64_t part, int64_t parts) {
    k.quantize(values, dtype, n, fp4, limits, log2, share(blocks, part, parts), share(blocks, part + 1, parts), bytes,
               scales);
  });
  return {packed, absmax};
}

void dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, Tensor out, Optional nested_absmax,
                     Optional nested_offset, Optional nested_code, int64_t) {
  const int64_t n = out.numel();
  const Dtype dtype = dtype_of("out", out.scalar_type());
  const Weight w = weight_of(packed, absmax, nested_absmax, nested_offset, nested_code, code, blocksize, 1, n);
  void* to = writable("out", out, out.scalar_type(), n);
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  const Kernels& k = kernels();
  in_parts(2 * n, [&](int64_t part, int64_t parts) {
    k.dequantize(w, n, share(blocks, part, parts), share(blocks, part + 1, parts), dtype, to);
  });
}

Tensor qlora_linear(Tensor x, Tensor packed, Tensor absmax, Tensor code, int64_t blocksize, int64_t out_features,
                    Optional bias, Optional lora_A, Optional lora_B, double scaling, Optional t,
                    Optional nested_absmax, Optional nested_offset, Optional nested_code, int64_t precision) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= 64, "x must have at least one dimension");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  make_contiguous(bias);
  make_contiguous(lora_A);
  make_contiguous(lora_B);
  const ScalarType type = x.scalar_type();
  const int64_t in = x.size(dim - 1), out = out_features;
  Forward job{};
  job.weight = weight_of(packed, absmax, nested_absmax, nested_offset, nested_code, code, blocksize, out, in);
  job.dtype = dtype_of("x", type);
  const int64_t total = x.numel();
  int64_t sizes[64];
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= sizes[i] = x.size(i);
  sizes[dim - 1] = out;
  job.rows = rows;
  job.rank = rank_of(lora_A, lora_B, in, out);
  STD_TORCH_CHECK(!bias.has_value() || bias->dim() == 1, "bias must be (", out, ")");
  job.scaling = static_cast<float>(scaling);
  job.x = memory("x", x, type, total);
  job.bias = memory("bias", bias, type, out);
  job.lora_A = memory("lora_A", lora_A, type, job.rank * in);
  job.lora_B = memory("lora_B", lora_B, type, out * job.rank);
  Tensor y = empty(x, sizes, dim);
  if (rows == 0 || out == 0) return y;
  job.y = y.mutable_data_ptr();
  void* t_memory = writable("t", t, type, rows * job.rank);
  Scratch t32(rows * job.rank, job.dtype == Dtype::float32 ? t_memory : nullptr);
  job.t = t32.data();

  const Kernels& k = kernels();
  forward(k, &job, 1, true, precision_from(precision));
  if (t_memory != nullptr && job.t != t_memory) k.narrow(job.t, rows * job.rank, job.dtype, t_memory);
  return y;
}

void qlora_linear_backward(Tensor grad, Optional x, Optional t, Tensor packed, Tensor absmax, Tensor code,
                           int64_t blocksize, int64_t in_features, Optional lora_A, Optional lora_B, double scaling,
                           Optional grad_x, Optional grad_bias, Optional grad_A, Optional grad_B,
                           Optional nested_absmax, Optional nested_offset, Optional nested_code) {
  const int64_t dim = grad.dim();
  STD_TORCH_CHECK(dim >= 1, "grad must have at least one dimension");
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  make_contiguous(x);
  make_contiguous(lora_A);
  make_contiguous(lora_B);
  const ScalarType type = grad.scalar_type();
  const int64_t in = in_features, out = grad.size(dim - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= grad.size(i);
  Backward job{};
  job.weight = weight_of(packed, absmax, nested_absmax, nested_offset, nested_code, code, blocksize, out, in);
  job.dtype = dtype_of("grad", type);
  job.rows = rows;
  job.rank = rank_of(lora_A, lora_B, in, out);
  job.scaling = static_cast<float>(scaling);
  job.grad = memory("grad", grad, type, rows * out);
  job.lora_A = memory("lora_A", lora_A, type, job.rank * in);
  job.lora_B = memory("lora_B", lora_B, type, out * job.rank);
  job.grad_x = writable("grad_x", grad_x, type, rows * in);
  job.grad_bias = writable("grad_bias", grad_bias, type, out);
  job.grad_A = writable("grad_A", grad_A, type, job.rank * in);
  job.grad_B = writable("grad_B", grad_B, type, out * job.rank);
  const bool wants_A = job.grad_A != nullptr, wants_B = job.grad_B != nullptr, wants_x = job.grad_x != nullptr;
  if (wants_A) {
    STD_TORCH_CHECK(x.has_value(), "grad_A requires x");
    job.x = memory("x", *x, type, rows * in);
  }

  Optional t_float;
  if (wants_B) {
    STD_TORCH_CHECK(t.has_value(), "grad_B requires t");
    t_float = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
    job.t = static_cast<const float*>(memory("t", *t_float, ScalarType::Float, rows * job.rank));
  }
  const bool wants_u = job.rank > 0 && (wants_x || wants_A);
  Scratch u(wants_u ? rows * job.rank : 0);
  job.u = u.data();
  backward(kernels(), &job, 1);
}

int64_t encoder_hold(std::vector<Tensor> tensors, std::vector<int64_t> facts, std::vector<double> factors) {
  auto description = std::make_shared<const Description>(
      Description{std::move(tensors), std::move(facts), std::move(factors)});
  const std::lock_guard<std::mutex> lock(descriptions_lock);
  descriptions.emplace(++last_description, std::move(description));
  return last_description;
}

void encoder_release(int64_t held) {
  const std::lock_guard<std::mutex> lock(descriptions_lock);
  descriptions.erase(held);
}

Tensor encoder(Tensor x, int64_t held, int64_t precision) {
  std::shared_ptr<const Description> description;
  {
    const std::lock_guard<std::mutex> lock(descriptions_lock);
    const auto found = descriptions.find(held);
    STD_TORCH_CHECK(found != descriptions.end(), "encoder: no layers are held under ", held);
    description = found->second;
  }
  const Precision reduced = precision_from(precision);
  Layers layers(*description);
  Encoder e{};
  STD_TORCH_CHECK(x.dim() == 3, "encoder: x must be (windows, tokens, features)");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t windows = x.size(0), features = x.size(2), depth = layers.fact();
  e.tokens = x.size(1);
  e.width = layers.fact();
  e.heads = layers.fact();
  e.ffn = layers.fact();
  STD_TORCH_CHECK(depth >= 0 && e.width > 0 && e.ffn > 0 && e.heads > 0 && e.width % e.heads == 0,
                  "encoder: facts do not fit");
  e.embed = layers.linear(features, e.width);
  e.positions = layers.floats("positions", e.tokens * e.width);
  for (int64_t i = 0; i < depth; ++i) {
    Block block{};
    block.norm1 = norm_of(layers, e.width);
    for (Forward* linear : {&block.q, &block.k, &block.v, &block.o}) *linear = layers.linear(e.width, e.width);
    block.norm2 = norm_of(layers, e.width);
    block.fc1 = layers.linear(e.width, e.ffn);
    block.fc2 = layers.linear(e.ffn, e.width);
    for (Forward* linear : {&block.q, &block.k, &block.v, &block.o, &block.fc1, &block.fc2}) {
      e.rank = std::max<int64_t>(e.rank, linear->rank);
    }
    e.blocks.push_back(block);
  }
  e.rank = std::max<int64_t>(e.rank, e.embed.rank);
  e.norm = norm_of(layers, e.width);
  STD_TORCH_CHECK(layers.done(), "encoder: more tensors, facts or factors than layers");
  const auto* from = static_cast<const float*>(memory("x", x, ScalarType::Float, x.numel()));
  const int64_t sizes[3] = {windows, e.tokens, e.width};
  Tensor y = empty(x, sizes, 3);
  if (windows == 0 || e.tokens == 0) return y;
  auto* to = static_cast<float*>(y.mutable_data_ptr());

  const Kernels& k = kernels();
  const int64_t attention_floats = k.attention_scratch(e.tokens, e.width, e.heads);
  const int64_t most = threads_usable() ? torch::stable::get_num_threads() : 1;
  // With windows enough for all threads, each takes its own through all layers and none waits for another. A chunk is
  // as large as a second-level cache likes, to decode each weight as rarely as possible.
  const int64_t chunk = std::max<int64_t>(1, kRowsOfChunk / e.tokens);
  const bool apart = windows * e.tokens >= most * kRowsOfChunk / 4 && windows >= most;
  if (most == 1 || !apart) {
    const int64_t chunks = (windows + chunk - 1) / chunk;
    const int64_t pieces = most == 1 ? chunks : 1, at_once = (windows + pieces - 1) / pieces;
    std::unique_ptr<float[]> scratch(new float[e.floats_of_row() * at_once * e.tokens + most * attention_floats]);
    float* attention = scratch.get() + e.floats_of_row() * at_once * e.tokens;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t window = share(windows, piece, pieces);
      encode(k, e, from + window * e.tokens * features, share(windows, piece + 1, pieces) - window, most > 1, reduced,
             scratch.get(), attention, attention_floats, to + window * e.tokens * e.width);
    }
    return y;
  }
  torch::stable::parallel_for(0, most, 1, [&](int64_t first_part, int64_t last_part) {
    for (int64_t part = first_part; part < last_part; ++part) {
      const int64_t first = share(windows, part, most), last = share(windows, part + 1, most);
      const int64_t chunks = (last - first + chunk - 1) / chunk;
      const int64_t at_once = chunks == 0 ? 0 : (last - first + chunks - 1) / chunks;
      std::unique_ptr<float[]> scratch(new float[e.floats_of_row() * at_once * e.tokens + attention_floats]);
      float* attention = scratch.get() + e.floats_of_row() * at_once * e.tokens;
      for (int64_t piece = 0; piece < chunks; ++piece) {
        // Evenly: a last piece of few rows would be rounded otherwise than with another number of threads.
        const int64_t window = first + share(last - first, piece, chunks);
        encode(k, e, from + window * e.tokens * features, first + share(last - first, piece + 1, chunks) - window,
               false, reduced, scratch.get(), attention, attention_floats, to + window * e.tokens * e.width);
      }
    }
  });
  return y;
}

namespace {

constexpr int64_t kRowsOfMlp = 128;  // whose hidden values stay in a second-level cache

// Rows of x, which is (..., in) in float32.
int64_t rows_of(const Tensor& x, int64_t in) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= 64 && in > 0 && x.size(x.dim() - 1) == in, "x has another in_features");
  return x.numel() / in;
}

// Like x, but with another last dimension.
Tensor empty_rows(const Tensor& x, int64_t last) {
  int64_t sizes[64];
  const int64_t dim = x.dim();
  for (int64_t i = 0; i + 1 < dim; ++i) sizes[i] = x.size(i);
  sizes[dim - 1] = last;
  return empty(x, sizes, dim);
}

float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Linear layers one after the other in a description: in_features, then for each out_features and what Layers::linear
// reads. `from_hidden`: the second layer takes what the first gives, instead of x.
std::vector<Forward> linears(const Description& d, size_t count, bool from_hidden) {
  Layers layers(d);
  std::vector<Forward> found;
  int64_t in = layers.fact();
  STD_TORCH_CHECK(in > 0, "facts: in_features must be positive");
  for (size_t i = 0; i < count; ++i) {
    const int64_t out = layers.fact();
    STD_TORCH_CHECK(out > 0, "facts: out_features must be positive");
    found.push_back(layers.linear(in, out));
    found.back().dtype = Dtype::float32;
    STD_TORCH_CHECK(found.back().weight.dense == nullptr, "facts: blocksize must be that of a weight in 4 bits");
    if (from_hidden) in = out;
  }
  STD_TORCH_CHECK(layers.done(), "more tensors, facts or factors than layers");
  return found;
}

int64_t ranks_of(const std::vector<Forward>& jobs) {
  int64_t ranks = 0;
  for (const Forward& job : jobs) ranks += job.rank;
  return ranks;
}

// The gradients of one layer's parameters, as far as they are wanted; appended to `grads`, which keeps them alive.
Backward backward_of(const Forward& layer, const Tensor& like, int64_t rows, const float* x, const float* t, float* u,
                     const float* grad, int64_t wanted, std::vector<Tensor>& grads) {
  Backward job{};
  job.weight = layer.weight;
  job.dtype = Dtype::float32;
  job.rows = rows;
  job.rank = layer.rank;
  job.scaling = layer.scaling;
  job.grad = grad;
  job.x = x;
  job.t = t;
  job.u = u;
  job.lora_A = layer.lora_A;
  job.lora_B = layer.lora_B;
  const int64_t bias[1] = {layer.weight.out}, A[2] = {layer.rank, layer.weight.in},
                B[2] = {layer.weight.out, layer.rank}, none[1] = {0};
  const bool adapted = layer.rank > 0;
  grads.push_back((wanted & 1) != 0 ? empty(like, bias, 1) : empty(like, none, 1));
  if ((wanted & 1) != 0) job.grad_bias = floats_of(grads.back());
  grads.push_back((wanted & 2) != 0 ? empty(like, A, 2) : empty(like, none, 1));
  if (adapted && (wanted & 2) != 0) job.grad_A = floats_of(grads.back());
  grads.push_back((wanted & 4) != 0 ? empty(like, B, 2) : empty(like, none, 1));
  if (adapted && (wanted & 4) != 0) job.grad_B = floats_of(grads.back());
  return job;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> qlora_qkv(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                                     std::vector<double> factors, int64_t precision) {
  const Description d{std::move(tensors), std::move(facts), std::move(factors)};
  std::vector<Forward> jobs = linears(d, 3, false);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t rows = rows_of(x, jobs[0].weight.in);
  const auto* from = static_cast<const float*>(memory("x", x, ScalarType::Float, x.numel()));
  const int64_t flat[1] = {rows * ranks_of(jobs)};
  Tensor t = empty(x, flat, 1);
  std::vector<Tensor> y;
  float* next_t = floats_of(t);
  for (Forward& job : jobs) {
    y.push_back(empty_rows(x, job.weight.out));
    job.rows = rows;
    job.x = from;
    job.y = floats_of(y.back());
    job.t = next_t;
    next_t += rows * job.rank;
  }
  if (rows > 0) forward(kernels(), jobs.data(), 3, true, precision_from(precision));
  return {y[0], y[1], y[2], t};
}

std::vector<Tensor> qlora_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor x, Tensor t,
                                       std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                       std::vector<double> factors, std::vector<int64_t> wanted) {
  const Description d{std::move(tensors), std::move(facts), std::move(factors)};
  const std::vector<Forward> layers = linears(d, 3, false);
  STD_TORCH_CHECK(wanted.size() == 4, "wanted must have 4 values");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t in = layers[0].weight.in, rows = rows_of(x, in);
  const auto* from = static_cast<const float*>(memory("x", x, ScalarType::Float, x.numel()));
  const auto* ts = static_cast<const float*>(memory("t", t, ScalarType::Float, rows * ranks_of(layers)));
  Tensor grads_y[3] = {grad_q, grad_k, grad_v};
  const int64_t none[1] = {0};
  std::vector<Tensor> grads{wanted[0] != 0 ? empty_rows(x, in) : empty(x, none, 1)};
  float* to = wanted[0] != 0 ? floats_of(grads[0]) : nullptr;
  Scratch u(rows * ranks_of(layers));
  std::vector<Backward> jobs;
  int64_t offset = 0;
  for (int i = 0; i < 3; ++i) {
    if (!grads_y[i].is_contiguous()) grads_y[i] = torch::stable::contiguous(grads_y[i]);
    const auto* grad = static_cast<const float*>(
        memory("grad", grads_y[i], ScalarType::Float, rows * layers[i].weight.out));
    jobs.push_back(
        backward_of(layers[i], x, rows, from, ts + offset, u.data() + offset, grad, wanted[i + 1], grads));
    jobs.back().grad_x = to;
    jobs.back().add_x = i > 0;
    offset += rows * layers[i].rank;
  }
  backward(kernels(), jobs.data(), 3);
  return grads;
}

std::tuple<Tensor, Tensor, Tensor> qlora_mlp(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> facts,
                                             std::vector<double> factors, bool keep, int64_t precision) {
  const Description d{std::move(tensors), std::move(facts), std::move(factors)};
  const std::vector<Forward> layers = linears(d, 2, true);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t in = layers[0].weight.in, ffn = layers[0].weight.out, out = layers[1].weight.out;
  const int64_t rows = rows_of(x, in), ranks = ranks_of(layers);
  const auto* from = static_cast<const float*>(memory("x", x, ScalarType::Float, x.numel()));
  const int64_t none[1] = {0}, flat[1] = {keep ? rows * ranks : 0};
  Tensor y = empty_rows(x, out), t = empty(x, flat, 1);
  Tensor inner = keep ? empty_rows(x, ffn) : empty(x, none, 1);
  float* to = floats_of(y);
  float* kept = keep ? floats_of(inner) : nullptr;
  float* kept_t = keep ? floats_of(t) : nullptr;
  const Kernels& k = kernels();
  const auto some = [&](float* scratch, int64_t first, int64_t count, bool threads) {
    float* hidden = scratch;
    float* unkept_t = hidden + count * ffn;
    Forward job = layers[0];
    job.rows = count;
    job.x = from + first * in;
    job.y = keep ? kept + first * ffn : hidden;
    job.t = keep ? kept_t + first * job.rank : unkept_t;
    job.gelu = !keep;
    forward(k, &job, 1, threads, precision_from(precision));
    if (keep) {
      in_parts(threads ? 8 * count * ffn : 0, [&](int64_t part, int64_t parts) {
        const int64_t begin = share(count * ffn, part, parts), end = share(count * ffn, part + 1, parts);
        k.gelu(kept + first * ffn + begin, end - begin, hidden + begin);
      });
    }
    job = layers[1];
    job.rows = count;
    job.x = hidden;
    job.y = to + first * out;
    job.t = keep ? kept_t + rows * layers[0].rank + first * job.rank : unkept_t;
    forward(k, &job, 1, threads, precision_from(precision));
  };
  const int64_t threads = threads_usable() ? torch::stable::get_num_threads() : 1;
  // With rows enough for all threads, each takes its own through both layers, so that hidden values stay in its cache.
  // Fewer would be served by kernels for few rows, whose sums are rounded otherwise.
  const bool apart = rows >= threads * kRowsOfMlp / 2;
  const int64_t chunks = apart ? (rows + threads * kRowsOfMlp - 1) / (threads * kRowsOfMlp) * threads : 1;
  const int64_t room = ((rows + chunks - 1) / chunks) * (ffn + ranks);
  if (rows > 0 && !apart) {
    Scratch scratch(room);
    some(scratch.data(), 0, rows, true);
  } else if (rows > 0) {
    const int64_t work = threads == 1 ? 0 : rows * (in * ffn + ffn * out);
    Scratch scratch(parts_of(work) * room);
    in_parts(work, [&](int64_t part, int64_t parts) {
      for (int64_t chunk = share(chunks, part, parts); chunk < share(chunks, part + 1, parts); ++chunk) {
        const int64_t first = share(rows, chunk, chunks);
        some(scratch.data() + part * room, first, share(rows, chunk + 1, chunks) - first, false);
      }
    });
  }
  return {y, inner, t};
}

std::vector<Tensor> qlora_mlp_backward(Tensor grad, Tensor x, Tensor inner, Tensor t, std::vector<Tensor> tensors,
                                       std::vector<int64_t> facts, std::vector<double> factors,
                                       std::vector<int64_t> wanted) {
  const Description d{std::move(tensors), std::move(facts), std::move(factors)};
  const std::vector<Forward> layers = linears(d, 2, true);
  STD_TORCH_CHECK(wanted.size() == 3, "wanted must have 3 values");
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const int64_t in = layers[0].weight.in, ffn = layers[0].weight.out, out = layers[1].weight.out;
  const int64_t rows = rows_of(x, in);
  const auto* from = static_cast<const float*>(memory("x", x, ScalarType::Float, x.numel()));
  const auto* before = static_cast<const float*>(memory("inner", inner, ScalarType::Float, rows * ffn));
  const auto* ts = static_cast<const float*>(memory("t", t, ScalarType::Float, rows * ranks_of(layers)));
  const auto* grad_y = static_cast<const float*>(memory("grad", grad, ScalarType::Float, rows * out));
  const int64_t none[1] = {0};
  std::vector<Tensor> grads{wanted[0] != 0 ? empty_rows(x, in) : empty(x, none, 1)};
  Scratch u(rows * ranks_of(layers));
  // First what the second layer's gradients need, gelu(fc1(x)); then, in the same memory, the gradient of fc1(x).
  Scratch hidden(rows * ffn);
  const int64_t second = rows * layers[0].rank;
  Backward jobs[2] = {
      backward_of(layers[0], x, rows, from, ts, u.data(), hidden.data(), wanted[1], grads),
      backward_of(layers[1], x, rows, hidden.data(), ts + second, u.data() + second, grad_y, wanted[2], grads)};
  if (wanted[0] != 0) jobs[0].grad_x = floats_of(grads[0]);
  const Kernels& k = kernels();
  const auto over_hidden = [&](const auto& f) {
    in_parts(8 * rows * ffn, [&](int64_t part, int64_t parts) {
      const int64_t first = share(rows, part, parts) * ffn, last = share(rows, part + 1, parts) * ffn;
      f(before + first, last - first, hidden.data() + first);
    });
  };
  const bool has_u = jobs[1].grad_A != nullptr;
  if (has_u) over_hidden(k.gelu);
  backward(k, jobs + 1, 1);
  Backward between = jobs[1];
  between.grad_bias = between.grad_A = between.grad_B = nullptr;
  between.grad_x = hidden.data();
  backward(k, &between, 1, has_u);
  over_hidden(k.gelu_backward);
  backward(k, jobs, 1);
  return grads;
}

namespace {

// f(first, last, scratch) over the heads of all windows of q, k and v, which are (windows, tokens, width).
template <typename F>
void over_heads(const Kernels& k, const Tensor& q, int64_t heads, const F& f) {
  const int64_t tokens = q.size(1), width = q.size(2), all = q.size(0) * heads;
  const int64_t floats = k.attention_scratch(tokens, width, heads), work = 16 * q.numel() * tokens;
  Scratch scratch(parts_of(work) * floats);
  in_parts(work, [&](int64_t part, int64_t parts) {
    f(share(all, part, parts), share(all, part + 1, parts), scratch.data() + part * floats);
  });
}

const float* head_values(const char* name, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == q.size(0) && tensor.size(1) == q.size(1), name,
                  " must have the shape of q");
  return static_cast<const float*>(memory(name, tensor, ScalarType::Float, q.numel()));
}

void check_heads(const Tensor& q, int64_t heads) {
  STD_TORCH_CHECK(q.dim() == 3 && heads > 0 && q.size(2) > 0 && q.size(2) % heads == 0,
                  "attention: q must be (windows, tokens, width), width a multiple of heads");
}

}  // namespace

Tensor attention(Tensor q, Tensor k, Tensor v, int64_t heads) {
  check_heads(q, heads);
  const float *from_q = head_values("q", q, q), *from_k = head_values("k", k, q), *from_v = head_values("v", v, q);
  Tensor y = empty_rows(q, q.size(2));
  if (q.numel() == 0) return y;
  float* to = floats_of(y);
  const Kernels& kernel = kernels();
  over_heads(kernel, q, heads, [&](int64_t first, int64_t last, float* scratch) {
    kernel.attention(from_q, from_k, from_v, q.size(1), q.size(2), heads, first, last, scratch, to);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int64_t heads) {
  check_heads(q, heads);
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  const float *from = head_values("grad", grad, q), *from_q = head_values("q", q, q);
  const float *from_k = head_values("k", k, q), *from_v = head_values("v", v, q);
  Tensor grads[3] = {empty_rows(q, q.size(2)), empty_rows(q, q.size(2)), empty_rows(q, q.size(2))};
  if (q.numel() > 0) {
    float *to_q = floats_of(grads[0]), *to_k = floats_of(grads[1]), *to_v = floats_of(grads[2]);
    const Kernels& kernel = kernels();
    over_heads(kernel, q, heads, [&](int64_t first, int64_t last, float* scratch) {
      kernel.attention_backward(from, from_q, from_k, from_v, q.size(1), q.size(2), heads, first, last, scratch, to_q,
                                to_k, to_v);
    });
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace harlora::cpu
