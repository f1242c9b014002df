#include "launches.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <variant>

#include "../cuda/encoder.h"
#include "../cuda/lora_grads.h"
#include "../cuda/qlora_dx.h"
#include "../cuda/qlora_gemm.h"
#include "../cuda/qlora_gemm_sm90.h"
#include "../cuda/qlora_gemv.h"

namespace harlora::gpu {
namespace {

using torch::stable::Tensor;

struct Layout {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
};

enum class Kind : int64_t { input = 0, buffer = 1, bits32 = 2, bits64 = 3 };

struct Parameter {
  Kind kind;
  int64_t value, offset;
};

struct Launch {
  void* function;
  unsigned grid[3];
  unsigned threads, shared_bytes;
  std::vector<Parameter> parameters;
};

// The part of the driver's interface that is used, whose ABI is fixed.
struct Driver {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*current_device)(int*);

  // The handle is not closed: functions of the library may be in use until the process ends.
  static Driver load(const std::string& name) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    STD_TORCH_CHECK(library, "launches_hold: ", name, " does not load: ", dlerror());
    const auto symbol = [&](const char* function) {
      void* found = dlsym(library, function);
      STD_TORCH_CHECK(found, "launches_hold: ", name, " has no ", function);
      return found;
    };
    return {reinterpret_cast<decltype(launch)>(symbol("cuLaunchKernel")),
            reinterpret_cast<decltype(current_device)>(symbol("cuCtxGetDevice"))};
  }
};

// torch's own products, past its dispatcher, which has nothing to add below autograd. Those for GPUs are in a library
// that a build for CPUs does not have.
struct Products {
  AOTITorchError (*addmm)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  AOTITorchError (*mm)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);

  static Products load(int32_t device_type) {
    const std::string device = device_type == aoti_torch_device_type_cpu() ? "cpu" : "cuda";
    void* library = dlopen(("libtorch_" + device + ".so").c_str(), RTLD_NOW | RTLD_NOLOAD);
    STD_TORCH_CHECK(library, "launches_hold: torch's library for ", device, " is not loaded");
    const auto symbol = [&](const std::string& function) {
      void* found = dlsym(library, ("aoti_torch_" + device + "_" + function).c_str());
      STD_TORCH_CHECK(found, "launches_hold: torch's library for ", device, " has no ", function);
      return found;
    };
    return {reinterpret_cast<decltype(addmm)>(symbol("addmm_out")), reinterpret_cast<decltype(mm)>(symbol("mm_out"))};
  }
};

enum class Place : int64_t { input = 0, buffer = 1, constant = 2, absent = 3 };

// A part of an input or buffer, offset in values from its first, or all of it; a tensor that is there for good; none.
struct View {
  Place place;
  int64_t which, offset;
  std::vector<int64_t> sizes, strides;
  bool whole;
  std::optional<Tensor> constant;

  bool same_as(const View& other) const {
    return place == other.place && which == other.which && offset == other.offset && sizes == other.sizes &&
           strides == other.strides;
  }
};

enum class Work : int64_t {
  launch = 0, addmm = 1, mm = 2, copy = 3, gemv = 4, gemm = 5, mma = 6, encoder = 7, dx = 8, grads = 9
};
constexpr int64_t works = 10;

// What is done with whole tensors: out = beta·self + alpha·a·b (out, self, a, b), out = a·b, out = a rounded, or what
// csrc/cuda/ has of that name, with the tensors, numbers and factor of its arguments in their order.
struct Product {
  Work work;
  std::vector<View> tensors;
  std::vector<int64_t> numbers;
  double beta, alpha;
  bool adds;  // to what is in `out`, which is self
};

struct Recording {
  Driver driver;
  Products products;
  int32_t device_type, device_index;
  std::vector<Layout> inputs, buffers;
  std::vector<int64_t> outputs;
  std::vector<std::variant<Launch, Product>> steps;
};

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& facts) : facts_(facts) {}
  int64_t next() {
    STD_TORCH_CHECK(place_ < facts_.size(), "launches_hold: facts end too early");
    return facts_[place_++];
  }
  int64_t below(int64_t limit) {
    const int64_t value = next();
    STD_TORCH_CHECK(value >= 0 && value < limit, "launches_hold: facts name ", value, " of ", limit);
    return value;
  }
  bool ended() const { return place_ == facts_.size(); }

 private:
  const std::vector<int64_t>& facts_;
  size_t place_ = 0;
};

constexpr int64_t most = 1 << 16;  // of anything that is counted

Layout layout_of(Reader& facts, bool strided) {
  Layout layout{};
  layout.dtype = static_cast<int32_t>(facts.next());
  layout.sizes.resize(facts.below(64));
  for (int64_t& size : layout.sizes) size = facts.next();
  layout.strides.resize(layout.sizes.size());
  int64_t stride = 1;
  for (size_t i = layout.sizes.size(); i-- > 0;) {
    layout.strides[i] = stride;
    stride *= layout.sizes[i] > 1 ? layout.sizes[i] : 1;
  }
  if (strided) {
    for (int64_t& given : layout.strides) given = facts.next();
  }
  return layout;
}

Launch launch_of(Reader& facts, int64_t inputs, int64_t buffers) {
  Launch launch{};
  launch.function = reinterpret_cast<void*>(facts.next());
  for (unsigned& size : launch.grid) size = static_cast<unsigned>(facts.next());
  launch.threads = static_cast<unsigned>(facts.next());
  launch.shared_bytes = static_cast<unsigned>(facts.next());
  for (int64_t i = facts.below(most); i > 0; --i) {
    const auto kind = static_cast<Kind>(facts.below(4));
    const int64_t value = kind == Kind::input    ? facts.below(inputs)
                          : kind == Kind::buffer ? facts.below(buffers)
                                                 : facts.next();
    launch.parameters.push_back({kind, value, facts.next()});
  }
  return launch;
}

View view_of(Reader& facts, const Recording& recording) {
  View view{};
  view.place = static_cast<Place>(facts.below(4));
  if (view.place == Place::absent) return view;
  const bool constant = view.place == Place::constant;
  const auto& wholes = view.place == Place::input ? recording.inputs : recording.buffers;
  view.which = constant ? facts.next() : facts.below(static_cast<int64_t>(wholes.size()));
  view.offset = facts.next();
  view.sizes.resize(facts.below(64));
  view.strides.resize(view.sizes.size());
  for (int64_t& size : view.sizes) size = facts.next();
  for (int64_t& stride : view.strides) stride = facts.next();
  if (constant) {  // by its address and dtype
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        reinterpret_cast<void*>(view.which), static_cast<int64_t>(view.sizes.size()), view.sizes.data(),
        view.strides.data(), 0, static_cast<int32_t>(view.offset), recording.device_type, recording.device_index,
        &handle));
    view.constant = Tensor(handle);
  } else {
    const Layout& layout = wholes[view.which];
    view.whole = view.offset == 0 && view.sizes == layout.sizes && view.strides == layout.strides;
  }
  return view;
}

Product product_of(Reader& facts, Work work, const Recording& recording) {
  Product product{work, {}, {}, 0, 0, false};
  for (int64_t i = facts.below(most); i > 0; --i) product.tensors.push_back(view_of(facts, recording));
  for (int64_t i = facts.below(most); i > 0; --i) product.numbers.push_back(facts.next());
  for (double* factor : {&product.beta, &product.alpha}) {
    const int64_t bits = facts.next();
    std::memcpy(factor, &bits, sizeof bits);
  }
  const std::pair<size_t, size_t> wanted = work == Work::addmm  ? std::pair{4, 0}
                                           : work == Work::mm   ? std::pair{3, 0}
                                           : work == Work::copy ? std::pair{2, 0}
                                           : work == Work::gemv ? std::pair{12, 1}
                                           : work == Work::gemm ? std::pair{12, 3}
                                           : work == Work::mma  ? std::pair{13, 3}
                                           : work == Work::dx   ? std::pair{12, 3}
                                                                : std::pair{7, 0};
  const std::pair found(product.tensors.size(), product.numbers.size());
  // Of an encoder there are as many as it has layers; the eighth number says how many of the rest are eps.
  const bool fits = work != Work::encoder ? found == wanted
                                          : found.first > 4 && found.second > 8 && product.numbers[7] >= 0 &&
                                                product.numbers[7] <= static_cast<int64_t>(found.second) - 8;
  STD_TORCH_CHECK(fits,
                  "launches_hold: facts have another number of arguments");
  product.adds = work == Work::addmm && product.tensors[0].same_as(product.tensors[1]);
  return product;
}

Recording recording_of(const std::vector<int64_t>& numbers, const std::string& driver) {
  Reader facts(numbers);
  Recording recording{};
  recording.driver = Driver::load(driver);
  recording.device_type = static_cast<int32_t>(facts.next());
  recording.device_index = static_cast<int32_t>(facts.next());
  for (int64_t i = facts.below(most); i > 0; --i) recording.inputs.push_back(layout_of(facts, true));
  for (int64_t i = facts.below(most); i > 0; --i) recording.buffers.push_back(layout_of(facts, false));
  const auto inputs = static_cast<int64_t>(recording.inputs.size());
  const auto buffers = static_cast<int64_t>(recording.buffers.size());
  for (int64_t i = facts.below(most); i > 0; --i) recording.outputs.push_back(facts.below(buffers));
  for (int64_t i = facts.below(most); i > 0; --i) {
    const auto work = static_cast<Work>(facts.below(works));
    if (work == Work::launch) {
      recording.steps.emplace_back(launch_of(facts, inputs, buffers));
      continue;
    }
    if (work < Work::gemv && !recording.products.mm) recording.products = Products::load(recording.device_type);
    recording.steps.emplace_back(product_of(facts, work, recording));
  }
  STD_TORCH_CHECK(facts.ended(), "launches_hold: facts are left over");
  return recording;
}

std::mutex recordings_lock;
std::unordered_map<int64_t, std::shared_ptr<const Recording>> recordings;
int64_t last_recording = 0;

// Whether a tensor is as it was recorded: the kernels were compiled for such pointers, sizes and strides.
bool fits(const Tensor& tensor, const Layout& layout, const Recording& recording, char** memory) {
  AtenTensorHandle handle = tensor.get();
  int32_t dtype = 0, device_type = 0, device_index = 0;
  int64_t dim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
  *memory = static_cast<char*>(data);
  if (dtype != layout.dtype || device_type != recording.device_type || device_index != recording.device_index ||
      dim != static_cast<int64_t>(layout.sizes.size()) || reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    return false;
  }
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] != layout.sizes[i] || (sizes[i] > 1 && strides[i] != layout.strides[i])) return false;
  }
  return true;
}

void multiply(const Product& product, const Products& by, const std::vector<Tensor>& inputs,
              const std::vector<Tensor>& buffers, [[maybe_unused]] int64_t stream) {
  std::vector<std::optional<Tensor>> tensors;
  tensors.reserve(product.tensors.size());
  for (const View& view : product.tensors) {
    if (view.place == Place::constant || view.place == Place::absent) {
      tensors.push_back(view.constant);
      continue;
    }
    const Tensor& whole = (view.place == Place::input ? inputs : buffers)[view.which];
    if (view.whole) {
      tensors.emplace_back(whole);
      continue;
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(whole.get(), static_cast<int64_t>(view.sizes.size()),
                                                          view.sizes.data(), view.strides.data(), view.offset,
                                                          &handle));
    tensors.emplace_back(Tensor(handle));
  }
  const auto at = [&](size_t place) { return tensors[place]->get(); };
  switch (product.work) {
    case Work::addmm:
      // Of another tensor over the same memory torch would make a copy first.
      TORCH_ERROR_CODE_CHECK(
          by.addmm(at(0), product.adds ? at(0) : at(1), at(2), at(3), product.beta, product.alpha));
      return;
    case Work::mm:
      TORCH_ERROR_CODE_CHECK(by.mm(at(0), at(1), at(2)));
      return;
    case Work::copy:
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(at(0), at(1), 1));
      return;
#ifdef HARLORA_CUDA
    case Work::gemv:
      return cuda::qlora_gemv(*tensors[0], *tensors[1], *tensors[2], *tensors[3], product.numbers[0], tensors[4],
                              tensors[5], tensors[6], product.alpha, *tensors[7], *tensors[8], tensors[9],
                              tensors[10], tensors[11], stream);
    case Work::gemm:
      return cuda::qlora_gemm(*tensors[0], *tensors[1], *tensors[2], *tensors[3], product.numbers[0], tensors[4],
                              tensors[5], tensors[6], product.alpha, *tensors[7], *tensors[8], product.numbers[1],
                              product.numbers[2], tensors[9], tensors[10], tensors[11], stream);
    case Work::encoder: {
      const std::vector<int64_t>& sizes = product.numbers;
      std::vector<Tensor> of_layers;
      of_layers.reserve(tensors.size() - 4);
      for (size_t i = 4; i < tensors.size(); ++i) of_layers.push_back(tensors[i].value());
      std::vector<double> factors(sizes.size() - 8);
      std::memcpy(factors.data(), sizes.data() + 8, factors.size() * sizeof(double));
      const auto scaling = factors.begin() + sizes[7];
      return cuda::encoder_blocks(*tensors[0], std::move(of_layers), sizes[0], sizes[1], sizes[2], sizes[3] != 0,
                                  sizes[4] != 0, {factors.begin(), scaling}, {scaling, factors.end()}, *tensors[2],
                                  *tensors[1], sizes[5], sizes[6], tensors[3], stream);
    }
    case Work::mma:
      return cuda::qlora_mma(*tensors[0], *tensors[1], *tensors[2], *tensors[3], product.numbers[0], tensors[4],
                             tensors[5], tensors[6], product.alpha, *tensors[7], *tensors[8], product.numbers[1],
                             product.numbers[2], tensors[9], tensors[10], tensors[11], tensors[12], stream);
    case Work::dx:
      return cuda::qlora_dx(*tensors[0], *tensors[1], *tensors[2], *tensors[3], product.numbers[0], tensors[4],
                            tensors[5], product.alpha, tensors[6], tensors[7], tensors[8], product.numbers[1],
                            product.numbers[2], tensors[9], tensors[10], tensors[11], stream);
    case Work::grads:
      return cuda::lora_grads(*tensors[0], tensors[1], tensors[2], tensors[3], product.alpha, tensors[4], tensors[5],
                              tensors[6], stream);
#endif
    default:
      STD_TORCH_CHECK(false, "launches_run: the extension was built without CUDA");
  }
}

}  // namespace

int64_t launches_hold(std::vector<int64_t> facts, std::string driver) {
  auto recording = std::make_shared<const Recording>(recording_of(facts, driver));
  const std::lock_guard<std::mutex> lock(recordings_lock);
  recordings.emplace(++last_recording, std::move(recording));
  return last_recording;
}

void launches_release(int64_t held) {
  const std::lock_guard<std::mutex> lock(recordings_lock);
  recordings.erase(held);
}

std::vector<Tensor> launches_run(std::vector<Tensor> inputs, int64_t held, int64_t stream) {
  std::shared_ptr<const Recording> recording;
  {
    const std::lock_guard<std::mutex> lock(recordings_lock);
    const auto found = recordings.find(held);
    STD_TORCH_CHECK(found != recordings.end(), "launches_run: nothing is held under ", held);
    recording = found->second;
  }
  if (inputs.size() != recording->inputs.size()) return {};
  std::vector<char*> input_memory(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!fits(inputs[i], recording->inputs[i], *recording, &input_memory[i])) return {};
  }
  int device = -1;
  if (recording->driver.current_device(&device) != 0 || device != recording->device_index) return {};

  std::vector<Tensor> buffers;
  std::vector<char*> buffer_memory;
  buffers.reserve(recording->buffers.size());
  buffer_memory.reserve(recording->buffers.size());
  for (const Layout& layout : recording->buffers) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(layout.sizes.size()), layout.sizes.data(),
                                                    layout.strides.data(), layout.dtype, recording->device_type,
                                                    recording->device_index, &handle));
    buffers.emplace_back(handle);
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    buffer_memory.push_back(static_cast<char*>(data));
  }
  std::vector<int64_t> values;
  std::vector<void*> pointers;
  for (const auto& step : recording->steps) {
    if (const auto* product = std::get_if<Product>(&step)) {
      multiply(*product, recording->products, inputs, buffers, stream);
      continue;
    }
    const Launch& launch = std::get<Launch>(step);
    values.clear();
    pointers.clear();
    for (const Parameter& parameter : launch.parameters) {
      switch (parameter.kind) {
        case Kind::input:
          values.push_back(reinterpret_cast<int64_t>(input_memory[parameter.value] + parameter.offset));
          break;
        case Kind::buffer:
          values.push_back(reinterpret_cast<int64_t>(buffer_memory[parameter.value] + parameter.offset));
          break;
        default:
          values.push_back(parameter.value);  // of 32 bits, the driver reads the first four bytes: little-endian
      }
    }
    for (int64_t& value : values) pointers.push_back(&value);
    const int status =
        recording->driver.launch(launch.function, launch.grid[0], launch.grid[1], launch.grid[2], launch.threads, 1, 1,
                                 launch.shared_bytes, reinterpret_cast<void*>(stream), pointers.data(), nullptr);
    STD_TORCH_CHECK(status == 0, "a GPU kernel could not be launched: CUDA driver error ", status);
  }
  std::vector<Tensor> outputs;
  outputs.reserve(recording->outputs.size());
  for (const int64_t which : recording->outputs) outputs.push_back(buffers[which]);
  return outputs;
}

}  // namespace harlora::gpu
