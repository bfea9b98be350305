/// TensorRT 10 and 11: the library is found at run time, its headers where this file is compiled (TENSORRT_ROOT).
///
/// A session keeps device buffers and a CUDA graph for each of the last shapes that it met, and pinned host memory
/// where tiles come from the CPU. Where the CUDA kernels are compiled in (GDPO_CUDA_KERNELS), they need not.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <optional>

#include "backends/backend.hpp"
#include "backends/library.hpp"
#include "devices/cuda/cuda.hpp"
#ifdef GDPO_CUDA_KERNELS
#include "devices/cuda/device.hpp"
#endif

namespace gdpo::detail {
namespace {

constexpr std::size_t kKeptShapes = 4;

/// Keeps what TensorRT says, for messages.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard lock(mutex_);
      last_ = message;
    } catch (...) {  // no memory for a message: go on without
    }
  }
  std::string last() const {
    const std::lock_guard lock(mutex_);
    return last_.empty() ? "no reason given" : last_;
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

/// TensorRT's library with a runtime in it.
class Nvinfer {
 public:
  explicit Nvinfer(const std::vector<std::string>& names) : library_(names) {
    if (!library_.found()) {
      throw BackendError(text("TensorRT is not here (", library_.reasons(), "); install TensorRT ", NV_TENSORRT_MAJOR,
                              " and name its libnvinfer.so in GDPO_TENSORRT or Options::library"));
    }
    const auto library_version = reinterpret_cast<std::int32_t (*)()>(library_.find("getInferLibVersion"));
    const auto create = reinterpret_cast<void* (*)(void*, std::int32_t)>(library_.find("createInferRuntime_INTERNAL"));
    if (library_version == nullptr || create == nullptr) throw BackendError(library_.name() + " is not TensorRT");
    const std::int32_t number = library_version();  // 101600: 10.16.0; 8 and older counted otherwise
    const int major = number / 10000;
    if (major != NV_TENSORRT_MAJOR) {
      throw BackendError(
          text(library_.name(), " is TensorRT ", major, ", this library was built for ", NV_TENSORRT_MAJOR));
    }
    version = text(major, ".", number / 100 % 100, ".", number % 100);
    runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&log, NV_TENSORRT_VERSION)));
    if (runtime == nullptr) throw BackendError(text("TensorRT ", version, " makes no runtime: ", log.last()));
  }

 private:
  Library library_;  // unloaded last

 public:
  Log log;
  std::string version;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
};

/// Values of a tensor on the device and, from their first use on, in pinned memory.
class DeviceBuffer {
 public:
  DeviceBuffer(std::shared_ptr<const Driver> driver, const Shape& shape)
      : driver_(std::move(driver)),
        device_(driver_, CudaMemory::device, elements(shape[0], shape[1], shape[2], shape[3], sizeof(float))) {}

  float* device() const { return device_.data<float>(); }

  void upload(const Stream& stream, const float* values) {
    std::memcpy(host(), values, device_.size());
    stream.upload(device_.address(), host(), device_.size());
  }
  /// Into host(), once the stream is there.
  void download(const Stream& stream) { stream.download(host(), device_.address(), device_.size()); }
  void read(float* values) { std::memcpy(values, host(), device_.size()); }

 private:
  void* host() {
    if (!host_) host_.emplace(driver_, CudaMemory::pinned, device_.size());
    return host_->data();
  }

  std::shared_ptr<const Driver> driver_;
  CudaMemory device_;
  std::optional<CudaMemory> host_;
};

/// What one shape of inputs needs: buffers that stay, and the recorded graph.
struct Prepared {
  Prepared(std::shared_ptr<const Driver> driver, const std::vector<Shape>& inputs, const Shape& output)
      : driver(std::move(driver)), shapes(inputs) {
    for (const auto& shape : inputs) buffers.push_back(std::make_unique<DeviceBuffer>(this->driver, shape));
    result = std::make_unique<DeviceBuffer>(this->driver, output);
  }
  ~Prepared() {
    driver->enter();
    if (graph != nullptr) driver->p_cuGraphExecDestroy(graph);
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  std::shared_ptr<const Driver> driver;
  std::vector<Shape> shapes;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers;
  std::unique_ptr<DeviceBuffer> result;
  CUgraphExec graph = nullptr;
  bool refused = false;  // some layers cannot be captured: the plan runs without a graph
};

class TensorRtSession : public Session, public DeviceSession {
 public:
  TensorRtSession(std::shared_ptr<Nvinfer> nvinfer, std::shared_ptr<Gpu> gpu, const Manifest& manifest,
                  const Graph& graph, const Bytes& plan)
      : nvinfer_(std::move(nvinfer)), gpu_(std::move(gpu)), graph_(graph) {
    for (const auto& input : graph_.inputs) {
      const auto* const name = std::get_if<std::string>(&input.shape[2]);
      const std::int64_t side =
          manifest.tile[1] / (name != nullptr && *name == "height" ? 1 : manifest.geometry.factor);
      usual_.push_back({manifest.batch[1], side, side});
    }
    engine_.reset(nvinfer_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) {
      throw FolderError(text(graph.file, ": TensorRT refuses the plan (", nvinfer_->log.last(), ")"));
    }
    check_tensors();
  }

  ~TensorRtSession() override { gpu_->driver->enter(); }

  void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) override {
    const std::lock_guard lock(gpu_->mutex);
    gpu_->driver->activate();
    std::vector<Shape> shapes;
    for (const auto& feed : inputs) shapes.push_back(feed.shape);
    Prepared& state = prepared(shapes, shape);
    for (std::size_t i = 0; i < inputs.size(); ++i) state.buffers[i]->upload(gpu_->stream, inputs[i].data);
    start();
    state.result->download(gpu_->stream);
    gpu_->stream.synchronize();
    state.result->read(output);
  }

  DeviceSession* on_device() override { return this; }

  Slots slots(const std::vector<Shape>& inputs, const Shape& output) override {
    const Prepared& state = prepared(inputs, output);
    Slots found{{}, state.result->device()};
    for (const auto& buffer : state.buffers) found.inputs.push_back(buffer->device());
    return found;
  }

  /// Of the shape asked for last.
  void start() override {
    Prepared& state = *shapes_.front();
    if (state.graph != nullptr) {
      gpu_->driver->check(gpu_->driver->p_cuGraphLaunch(state.graph, gpu_->stream.get()), "cuGraphLaunch");
      return;
    }
    nvinfer1::IExecutionContext& context = context_of(state);
    bind(context, state);
    enqueue(context);
    record(context, state);
  }

 private:
  /// The plan's tensors must be those of the manifest, in float32.
  void check_tensors() const {
    std::vector<std::string> wanted = {graph_.output.name}, found;
    for (const auto& input : graph_.inputs) wanted.push_back(input.name);
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* const name = engine_->getIOTensorName(i);
      if (engine_->getTensorDataType(name) == nvinfer1::DataType::kFLOAT) found.emplace_back(name);
    }
    std::sort(wanted.begin(), wanted.end());
    std::sort(found.begin(), found.end());
    if (wanted != found) throw FolderError(graph_.file + ": its inputs and outputs are not what the manifest says");
  }

  Prepared& prepared(const std::vector<Shape>& inputs, const Shape& output) {
    const auto known =
        std::find_if(shapes_.begin(), shapes_.end(), [&](const auto& known) { return known->shapes == inputs; });
    if (known != shapes_.end()) {
      shapes_.splice(shapes_.begin(), shapes_, known);
    } else {
      if (shapes_.size() >= kKeptShapes) shapes_.pop_back();
      shapes_.push_front(std::make_unique<Prepared>(gpu_->driver, inputs, output));
    }
    return *shapes_.front();
  }

  /// The context of the profile for these shapes: the last of several is for the usual one (engine.build).
  nvinfer1::IExecutionContext& context_of(const Prepared& state) {
    bool usual = true;
    for (std::size_t i = 0; i < usual_.size(); ++i) {
      const Shape& shape = state.shapes[i];
      usual = usual && Shape{shape[0], shape[2], shape[3]} == usual_[i];
    }
    const std::int32_t profile = usual ? engine_->getNbOptimizationProfiles() - 1 : 0;
    auto& context = contexts_[profile];
    if (context == nullptr) {
      std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext());
      if (made == nullptr || (profile > 0 && !made->setOptimizationProfileAsync(profile, gpu_->stream.get()))) {
        throw BackendError(text(graph_.file, ": no context: ", nvinfer_->log.last()));
      }
      context = std::move(made);
    }
    return *context;
  }

  void bind(nvinfer1::IExecutionContext& context, const Prepared& state) {
    for (std::size_t i = 0; i < state.shapes.size(); ++i) {
      const char* const name = graph_.inputs[i].name.c_str();
      nvinfer1::Dims dims{};
      dims.nbDims = 4;
      std::copy(state.shapes[i].begin(), state.shapes[i].end(), dims.d);
      if (!context.setInputShape(name, dims)) {
        throw InvalidArgument(text(name, " is beyond the plan's profile (", nvinfer_->log.last(), ")"));
      }
      context.setTensorAddress(name, state.buffers[i]->device());
    }
    context.setTensorAddress(graph_.output.name.c_str(), state.result->device());
  }

  void enqueue(nvinfer1::IExecutionContext& context) {
    if (!context.enqueueV3(gpu_->stream.get())) {
      throw BackendError(text(graph_.file, ": the plan failed (", nvinfer_->log.last(), ")"));
    }
  }

  /// After the first run of a shape, which sets up what a capture must not, record it.
  void record(nvinfer1::IExecutionContext& context, Prepared& state) {
    if (state.refused) return;
    const Driver& driver = *gpu_->driver;
    const CUstream stream = gpu_->stream.get();
    gpu_->stream.synchronize();
    driver.check(driver.p_cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_RELAXED), "cuStreamBeginCapture");
    const bool recorded = context.enqueueV3(stream);
    CUgraph graph = nullptr;
    const CUresult ended = driver.p_cuStreamEndCapture(stream, &graph);
    state.refused = !recorded || ended != CUDA_SUCCESS || graph == nullptr ||
                    driver.p_cuGraphInstantiateWithFlags(&state.graph, graph, 0) != CUDA_SUCCESS;
    if (graph != nullptr) driver.p_cuGraphDestroy(graph);
  }

  std::shared_ptr<Nvinfer> nvinfer_;
  std::shared_ptr<Gpu> gpu_;
  const Graph graph_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<Shape> usual_;  // of each input: batch, rows, columns
  std::map<std::int32_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // of each profile that was needed
  std::list<std::unique_ptr<Prepared>> shapes_;                                    // the latest first
};

class TensorRtBackend : public Backend {
 public:
  explicit TensorRtBackend(const Options& options)
      : index_(gpu_index(options.device.empty() ? "cuda" : options.device)), options_(options) {
    if (index_ < 0) throw InvalidArgument("device must be cuda or cuda:N for tensorrt; got 'cpu'");
  }

  /// Hashed, of this version, of this GPU, in this order, before TensorRT sees a byte. `load` asked whether it is
  /// trusted.
  std::unique_ptr<Session> open(const Manifest& manifest, const std::string& folder, const std::string& name) override {
    const Graph& graph = manifest.graphs.at(name);
    const Bytes plan = read_file(folder, graph.file, graph.sha256);
    if (nvinfer_ == nullptr) {
      const std::string soname = text("libnvinfer.so.", NV_TENSORRT_MAJOR);
      nvinfer_ = std::make_shared<Nvinfer>(candidates(options_.library, "GDPO_TENSORRT", {soname, "libnvinfer.so"}));
      nvinfer_->runtime->setEngineHostCodeAllowed(manifest.version_compatible);
    }
    const std::string rebuild = "build it again: python -m engine.build ONNX_FOLDER --backend tensorrt --out " + folder;
    const std::string& built = manifest.backend_version;  // "10.16.0.72" where the library says 10.16.0
    if (!manifest.version_compatible && built != nvinfer_->version && built.rfind(nvinfer_->version + ".", 0) != 0) {
      throw FolderError(text(folder, ": built by tensorrt ", built, ", here is ", nvinfer_->version, "; ", rebuild));
    }
    if (gpu_ == nullptr) gpu_ = std::make_shared<Gpu>(index_);
    const Driver& driver = *gpu_->driver;
    driver.activate();
    if (!manifest.architecture.empty() && manifest.architecture != driver.architecture()) {
      throw FolderError(
          text(folder, ": built for ", manifest.architecture, ", this GPU is ", driver.architecture(), "; ", rebuild));
    }
    return std::make_unique<TensorRtSession>(nvinfer_, gpu_, manifest, graph, plan);
  }

  const std::string& version() const override { return nvinfer_->version; }

#ifdef GDPO_CUDA_KERNELS
  std::shared_ptr<Accelerator> accelerator() override { return cuda_accelerator(gpu_); }
#endif

 private:
  int index_;
  Options options_;
  std::shared_ptr<Nvinfer> nvinfer_;
  std::shared_ptr<Gpu> gpu_;
};

}  // namespace

std::unique_ptr<Backend> tensorrt_backend(const Options& options) { return std::make_unique<TensorRtBackend>(options); }

}  // namespace gdpo::detail
