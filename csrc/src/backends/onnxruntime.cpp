/// ONNX Runtime, found when a folder needs it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "backends/backend.hpp"
#include "backends/library.hpp"
#include "backends/ort_api.hpp"
#include "picture/parallel.hpp"

namespace gdpo::detail {
namespace {

constexpr const char* kRemedy =
    "install it (pip install onnxruntime, or a release of ONNX Runtime 1.16 or newer) and name its library in "
    "GDPO_ONNXRUNTIME or Options::library";

/// A library with its table, checked, and the process's environment in it.
class Runtime {
 public:
  explicit Runtime(const std::vector<std::string>& names) : library_(names) {
    if (library_.no_memory()) throw std::bad_alloc();
    if (!library_.found()) throw BackendError(text("ONNX Runtime is not here (", library_.reasons(), "); ", kRemedy));
    const auto base = reinterpret_cast<const ort::Base* (*)()>(library_.find("OrtGetApiBase"));
    if (base == nullptr || base() == nullptr) {
      throw BackendError(text(library_.name(), " is not ONNX Runtime (no OrtGetApiBase); ", kRemedy));
    }
    base_ = base();
    version = base_->GetVersionString();
    const void* const* const table = older() ? nullptr : base_->GetApi(ort::kApiVersion);
    if (table == nullptr) throw BackendError(text(library_.name(), " is version ", version, "; ", kRemedy));
    bind(table, reinterpret_cast<const void*>(base));
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // from 1.29 on it reports its use to its maker, unless told otherwise
    check(api.CreateEnv(ort::kLogFatal, "gdpo", &env_));
  }
  ~Runtime() { api.ReleaseEnv(env_); }
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  const ort::Env* env() const { return env_; }

  /// Turn a failure into an exception. @param memory where memory that cannot be had is std::bad_alloc
  void check(ort::Status* status, bool memory = false) const {
    if (status == nullptr) return;
    const std::string message = one_line(api.GetErrorMessage(status));
    api.ReleaseStatus(status);
    const auto has = [&](const char* words) { return message.find(words) != std::string::npos; };
    if (memory && (has("Failed to allocate memory") || has("bad_alloc") || has("bad allocation"))) {
      throw std::bad_alloc();
    }
    throw BackendError("ONNX Runtime: " + message);
  }

  /// Weights beside the model, in memory.
  void add_external(ort::SessionOptions* options, const std::map<std::string, Bytes>& data) const {
    const void* const* const table = base_->GetApi(ort::kExternalVersion);
    if (table == nullptr || !same_object(table[ort::kExternalSlot], reinterpret_cast<const void*>(base_->GetApi))) {
      throw BackendError(text("weights in files of their own need ONNX Runtime 1.18; here is ", version));
    }
    std::vector<const char*> names;
    std::vector<char*> contents;
    std::vector<std::size_t> sizes;
    for (const auto& [name, bytes] : data) {
      names.push_back(name.c_str());
      contents.push_back(const_cast<char*>(bytes.data()));
      sizes.push_back(bytes.size());
    }
    const auto add =
        reinterpret_cast<ort::AddExternalInitializersFromFilesInMemory>(const_cast<void*>(table[ort::kExternalSlot]));
    check(add(options, names.data(), contents.data(), sizes.data(), names.size()));
  }

  ort::Api api;
  std::string version;

 private:
  bool older() const {
    int major = 0, minor = 0;
    return std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2 || major < 1 || (major == 1 && minor < 16);
  }

  /// Take the functions out of the table. Each must be code of this library, and the first of them must do what their
  /// names say; a table of another layout would show here and not as a crash later.
  void bind(const void* const* table, const void* base) {
    const char* const missing = ort::take(api, table, [&](const void* code) { return same_object(code, base); });
    if (missing != nullptr) throw BackendError(text(library_.name(), ": its table has no ", missing));
    ort::Status* const status = api.CreateStatus(3, "slots");
    const bool works =
        status != nullptr && api.GetErrorCode(status) == 3 && api.GetErrorMessage(status) == std::string("slots");
    if (status != nullptr) api.ReleaseStatus(status);
    if (!works) throw BackendError(library_.name() + ": its table is not ONNX Runtime's");
  }

  Library library_;
  const ort::Base* base_ = nullptr;
  ort::Env* env_ = nullptr;
};

/// One environment for each library in a process, as long as somebody uses it.
std::shared_ptr<Runtime> shared_runtime(const std::vector<std::string>& names) {
  static std::mutex mutex;
  static std::map<std::vector<std::string>, std::weak_ptr<Runtime>> known;
  const std::lock_guard lock(mutex);
  auto runtime = known[names].lock();
  if (runtime == nullptr) known[names] = runtime = std::make_shared<Runtime>(names);
  return runtime;
}

/// An object of ONNX Runtime's, released by the function given.
template <typename T>
class Owned {
 public:
  explicit Owned(void (*release)(T*)) : release_(release) {}
  ~Owned() {
    if (value_ != nullptr) release_(value_);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  T* get() const { return value_; }
  T** out() { return &value_; }

 private:
  void (*release_)(T*);
  T* value_ = nullptr;
};

class OnnxRuntimeSession : public Session {
 public:
  OnnxRuntimeSession(std::shared_ptr<Runtime> runtime, const Manifest& manifest, const Graph& graph, const Bytes& model,
                     std::map<std::string, Bytes> data, const ort::SessionOptions* options, bool one_by_one)
      : runtime_(std::move(runtime)),
        api_(runtime_->api),
        one_by_one_(one_by_one),
        data_(std::move(data)),
        memory_(api_.ReleaseMemoryInfo),
        session_(api_.ReleaseSession) {
    runtime_->check(api_.CreateCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, memory_.out()));
    runtime_->check(api_.CreateSessionFromArray(runtime_->env(), model.data(), model.size(), options, session_.out()));
    for (const auto& input : graph.inputs) inputs_.push_back(input.name);
    output_ = graph.output.name;
    compare(manifest, graph);
  }

  void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) override {
    const std::int64_t step = one_by_one_ ? 1 : shape[0];
    for (std::int64_t first = 0; first < shape[0]; first += step) {
      const auto part = [&](Shape sides) {
        sides[0] = step;
        return sides;
      };
      const auto skipped = [&](const Shape& sides) { return elements(first, sides[1], sides[2], sides[3]); };
      std::vector<Feed> feeds;
      for (const auto& feed : inputs) feeds.push_back({feed.data + skipped(feed.shape), part(feed.shape)});
      call(feeds, output + skipped(shape), part(shape));
    }
  }

 private:
  void call(const std::vector<Feed>& inputs, float* output, const Shape& shape) const {
    std::vector<std::unique_ptr<Owned<ort::Value>>> values;
    std::vector<const ort::Value*> bound;
    std::vector<const char*> names;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      bound.push_back(value(values, const_cast<float*>(inputs[i].data), inputs[i].shape));
      names.push_back(inputs_[i].c_str());
    }
    ort::Value* result = value(values, output, shape);
    const char* const name = output_.c_str();
    runtime_->check(api_.Run(session_.get(), nullptr, names.data(), bound.data(), bound.size(), &name, 1, &result),
                    true);
  }

  ort::Value* value(std::vector<std::unique_ptr<Owned<ort::Value>>>& values, float* data, const Shape& shape) const {
    values.push_back(std::make_unique<Owned<ort::Value>>(api_.ReleaseValue));
    const std::size_t bytes = elements(shape[0], shape[1], shape[2], shape[3]) * sizeof(float);
    runtime_->check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), data, bytes, shape.data(), shape.size(),
                                                        ort::kFloat, values.back()->out()));
    return values.back()->get();
  }

  /// The model's inputs and outputs must be what the manifest says they are.
  void compare(const Manifest& manifest, const Graph& graph) const {
    std::size_t inputs = 0, outputs = 0;
    runtime_->check(api_.SessionGetInputCount(session_.get(), &inputs));
    runtime_->check(api_.SessionGetOutputCount(session_.get(), &outputs));
    std::vector<Tensor> wanted = graph.inputs;
    wanted.push_back(graph.output);
    std::vector<Tensor> found;
    for (std::size_t i = 0; i < inputs; ++i) {
      found.push_back(describe(api_.SessionGetInputName, api_.SessionGetInputTypeInfo, i));
    }
    for (std::size_t i = 0; i < outputs; ++i) {
      found.push_back(describe(api_.SessionGetOutputName, api_.SessionGetOutputTypeInfo, i));
    }
    const auto fits = [&](const Tensor& ours, const Tensor& theirs) {
      if (ours.name != theirs.name || theirs.shape.size() != 4) return false;
      for (std::size_t i = 0; i < 4; ++i) {
        const std::int64_t side = std::get<std::int64_t>(theirs.shape[i]);  // -1 where it is free
        const auto* const name = std::get_if<std::string>(&ours.shape[i]);
        const std::int64_t wanted =
            name != nullptr ? manifest.fixed_side(*name) : std::get<std::int64_t>(ours.shape[i]);
        if (side >= 0 && side != wanted) return false;
      }
      return true;
    };
    bool same = inputs == graph.inputs.size() && outputs == 1;
    for (const auto& ours : wanted) {
      same = same && std::any_of(found.begin(), found.end(), [&](const Tensor& t) { return fits(ours, t); });
    }
    if (same) return;
    std::string names, shapes;
    for (std::size_t i = 0; i < found.size(); ++i) {
      names += (i == 0 ? "" : i == inputs ? ", outputs " : ", ") + printable(found[i].name);
      shapes += (i == 0 ? "" : ", ") + printable(found[i].name) + " " + found[i].describe();
    }
    throw FolderError(text(graph.file, ": inputs are ", names, ", not what the manifest says (", shapes, ")"));
  }

  /// A tensor of float32; one of another kind has no dimensions here. A dimension that is free is -1.
  template <typename GetName, typename GetInfo>
  Tensor describe(GetName get_name, GetInfo get_info, std::size_t index) const {
    ort::Allocator* allocator = nullptr;
    runtime_->check(api_.GetAllocatorWithDefaultOptions(&allocator));
    char* name = nullptr;
    runtime_->check(get_name(session_.get(), index, allocator, &name));
    Tensor result;
    result.name = name;
    runtime_->check(api_.AllocatorFree(allocator, name));
    Owned<ort::TypeInfo> type(api_.ReleaseTypeInfo);
    runtime_->check(get_info(session_.get(), index, type.out()));
    const ort::TensorInfo* info = nullptr;
    runtime_->check(api_.CastTypeInfoToTensorInfo(type.get(), &info));
    int element = 0;
    std::size_t rank = 0;
    if (info != nullptr) {  // null: a sequence or a map
      runtime_->check(api_.GetTensorElementType(info, &element));
      runtime_->check(api_.GetDimensionsCount(info, &rank));
    }
    if (element != ort::kFloat) return result;
    std::vector<std::int64_t> sides(rank);
    runtime_->check(api_.GetDimensions(info, sides.data(), rank));
    result.shape.assign(sides.begin(), sides.end());
    return result;
  }

  std::shared_ptr<Runtime> runtime_;
  const ort::Api& api_;
  const bool one_by_one_;
  std::map<std::string, Bytes> data_;  // ONNX Runtime reads the weights where they are
  Owned<ort::MemoryInfo> memory_;
  Owned<ort::Session> session_;
  std::vector<std::string> inputs_;
  std::string output_;
};

class OnnxRuntimeBackend : public Backend {
 public:
  explicit OnnxRuntimeBackend(const Options& options)
      : threads_(options.threads > 0 ? options.threads : usable_cores()),
        device_(options.device.empty() ? -1 : gpu_index(options.device)) {
    runtime_ =
        shared_runtime(candidates(options.library, "GDPO_ONNXRUNTIME", {"libonnxruntime.so.1", "libonnxruntime.so"}));
    if (device_ >= 0 && !has_cuda()) {
      throw BackendError(
          "device cuda: this ONNX Runtime has no CUDA provider; pip install onnxruntime-gpu instead of onnxruntime, or "
          "use the device cpu");
    }
  }

  std::unique_ptr<Session> open(const Manifest& manifest, const std::string& folder, const std::string& name) override {
    if (manifest.backend == "onnxruntime" && minor(manifest.backend_version) != minor(runtime_->version)) {
      throw FolderError(
          text(folder, ": optimised by ONNX Runtime ", manifest.backend_version, ", here is ", runtime_->version,
               "; build it again: python -m engine.build ONNX_FOLDER --backend onnxruntime --out ", folder));
    }
    const Graph& graph = manifest.graphs.at(name);
    const Bytes model = read_file(folder, graph.file, graph.sha256);
    std::map<std::string, Bytes> data;
    for (const auto& [file, hash] : graph.data) data[file] = read_file(folder, file, hash);
    Owned<ort::SessionOptions> settings(runtime_->api.ReleaseSessionOptions);
    configure(settings);
    if (!data.empty()) runtime_->add_external(settings.get(), data);
    try {
      // A CPU gains nothing from a batch and its caches lose by it: one tile at a time.
      const bool one_by_one = device_ < 0 && manifest.batch[0] == 1;
      return std::make_unique<OnnxRuntimeSession>(runtime_, manifest, graph, model, std::move(data), settings.get(),
                                                  one_by_one);
    } catch (const BackendError& error) {
      throw FolderError(text(folder, "/", graph.file, ": ONNX Runtime refuses it (", error.what(), ")"));
    }
  }

  const std::string& version() const override { return runtime_->version; }

 private:
  static std::string minor(const std::string& version) {
    return version.substr(0, version.find('.', version.find('.') + 1));
  }

  bool has_cuda() const {
    char** names = nullptr;
    int count = 0;
    runtime_->check(runtime_->api.GetAvailableProviders(&names, &count));
    const bool found =
        std::any_of(names, names + count, [](const char* n) { return std::string(n) == "CUDAExecutionProvider"; });
    runtime_->check(runtime_->api.ReleaseAvailableProviders(names, count));
    return found;
  }

  /// The settings of every session in this project: engine/runtime/backends/onnxruntime.py has the reasons.
  void configure(Owned<ort::SessionOptions>& settings) const {
    const auto& api = runtime_->api;
    runtime_->check(api.CreateSessionOptions(settings.out()));
    runtime_->check(api.SetIntraOpNumThreads(settings.get(), threads_));
    runtime_->check(api.SetInterOpNumThreads(settings.get(), 1));
    runtime_->check(api.SetSessionLogSeverityLevel(settings.get(), ort::kLogFatal));
    runtime_->check(api.DisableMemPattern(settings.get()));
    runtime_->check(api.AddSessionConfigEntry(settings.get(), "session.intra_op.allow_spinning", "0"));
    if (device_ < 0) return;
    Owned<ort::CudaOptions> cuda(api.ReleaseCUDAProviderOptions);
    runtime_->check(api.CreateCUDAProviderOptions(cuda.out()));
    const std::string index = std::to_string(device_);
    const char *const key = "device_id", *const value = index.c_str();
    runtime_->check(api.UpdateCUDAProviderOptions(cuda.get(), &key, &value, 1));
    runtime_->check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(settings.get(), cuda.get()));
  }

  int threads_, device_;
  std::shared_ptr<Runtime> runtime_;
};

}  // namespace

std::unique_ptr<Backend> onnxruntime_backend(const Options& options) {
  return std::make_unique<OnnxRuntimeBackend>(options);
}

}  // namespace gdpo::detail
