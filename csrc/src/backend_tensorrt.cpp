/// TensorRT 10 and 11: the library is found at run time, its headers where this file is compiled (TENSORRT_ROOT).
///
/// A session keeps device buffers, pinned host memory and a CUDA graph for each of the last shapes that it met.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>

#include "backend.hpp"
#include "cuda.hpp"
#include "library.hpp"

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

/// What one shape of inputs needs: buffers that stay, and the recorded graph.
struct Prepared {
  Prepared(std::shared_ptr<const Driver> driver, const std::vector<Feed>& inputs, const Shape& output)
      : driver(std::move(driver)) {
    for (const auto& feed : inputs) {
      shapes.push_back(feed.shape);
      buffers.push_back(std::make_unique<DeviceBuffer>(this->driver, feed.count()));
    }
    result = std::make_unique<DeviceBuffer>(this->driver, elements(output[0], output[1], output[2], output[3]));
  }
  ~Prepared() {
    if (graph != nullptr) driver->p_cuGraphExecDestroy(graph);
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  bool fits(const std::vector<Feed>& inputs) const {
    return std::equal(inputs.begin(), inputs.end(), shapes.begin(), shapes.end(),
                      [](const Feed& feed, const Shape& shape) { return feed.shape == shape; });
  }

  std::shared_ptr<const Driver> driver;
  std::vector<Shape> shapes;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers;
  std::unique_ptr<DeviceBuffer> result;
  CUgraphExec graph = nullptr;
  bool refused = false;  // some layers cannot be captured: the plan runs without a graph
};

/// A stream that ends with its owner.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {
    driver_->check(driver_->p_cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  }
  ~Stream() { driver_->p_cuStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  CUstream get() const { return stream_; }
  void synchronize() const { driver_->check(driver_->p_cuStreamSynchronize(stream_), "cuStreamSynchronize"); }

 private:
  std::shared_ptr<const Driver> driver_;
  CUstream stream_ = nullptr;
};

class TensorRtSession : public Session {
 public:
  TensorRtSession(std::shared_ptr<Nvinfer> nvinfer, std::shared_ptr<const Driver> driver, const Graph& graph,
                  const Bytes& plan)
      : nvinfer_(std::move(nvinfer)), driver_(std::move(driver)), graph_(graph), stream_(driver_) {
    engine_.reset(nvinfer_->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) {
      throw FolderError(text(graph.file, ": TensorRT refuses the plan (", nvinfer_->log.last(), ")"));
    }
    check_tensors();
    context_.reset(engine_->createExecutionContext());
    if (context_ == nullptr) throw BackendError(text(graph.file, ": no context: ", nvinfer_->log.last()));
  }

  void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) override {
    const std::lock_guard lock(mutex_);  // one context, one stream
    driver_->activate();
    Prepared& state = prepared(inputs, shape);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      std::memcpy(state.buffers[i]->host(), inputs[i].data, inputs[i].count() * sizeof(float));
      state.buffers[i]->upload(stream_.get());
    }
    if (state.graph != nullptr) {
      driver_->check(driver_->p_cuGraphLaunch(state.graph, stream_.get()), "cuGraphLaunch");
    } else {
      bind(state);
      enqueue();
      record(state);
    }
    state.result->download(stream_.get());
    stream_.synchronize();
    std::memcpy(output, state.result->host(), elements(shape[0], shape[1], shape[2], shape[3]) * sizeof(float));
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

  Prepared& prepared(const std::vector<Feed>& inputs, const Shape& output) {
    const auto known = std::find_if(shapes_.begin(), shapes_.end(), [&](const auto& s) { return s->fits(inputs); });
    if (known != shapes_.end()) {
      shapes_.splice(shapes_.begin(), shapes_, known);
    } else {
      if (shapes_.size() >= kKeptShapes) shapes_.pop_back();
      shapes_.push_front(std::make_unique<Prepared>(driver_, inputs, output));
    }
    return *shapes_.front();
  }

  void bind(const Prepared& state) {
    for (std::size_t i = 0; i < state.shapes.size(); ++i) {
      const char* const name = graph_.inputs[i].name.c_str();
      nvinfer1::Dims dims{};
      dims.nbDims = 4;
      std::copy(state.shapes[i].begin(), state.shapes[i].end(), dims.d);
      if (!context_->setInputShape(name, dims)) {
        throw InvalidArgument(text(name, " is beyond the plan's profile (", nvinfer_->log.last(), ")"));
      }
      context_->setTensorAddress(name, state.buffers[i]->device());
    }
    context_->setTensorAddress(graph_.output.name.c_str(), state.result->device());
  }

  void enqueue() {
    if (!context_->enqueueV3(stream_.get())) {
      throw BackendError(text(graph_.file, ": the plan failed (", nvinfer_->log.last(), ")"));
    }
  }

  /// After the first run of a shape, which sets up what a capture must not, record it.
  void record(Prepared& state) {
    if (state.refused) return;
    stream_.synchronize();
    driver_->check(driver_->p_cuStreamBeginCapture(stream_.get(), CU_STREAM_CAPTURE_MODE_RELAXED),
                   "cuStreamBeginCapture");
    const bool recorded = context_->enqueueV3(stream_.get());
    CUgraph graph = nullptr;
    const CUresult ended = driver_->p_cuStreamEndCapture(stream_.get(), &graph);
    state.refused = !recorded || ended != CUDA_SUCCESS || graph == nullptr ||
                    driver_->p_cuGraphInstantiateWithFlags(&state.graph, graph, 0) != CUDA_SUCCESS;
    if (graph != nullptr) driver_->p_cuGraphDestroy(graph);
  }

  std::shared_ptr<Nvinfer> nvinfer_;
  std::shared_ptr<const Driver> driver_;
  const Graph graph_;
  std::mutex mutex_;
  Stream stream_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::list<std::unique_ptr<Prepared>> shapes_;  // the latest first
};

class TensorRtBackend : public Backend {
 public:
  explicit TensorRtBackend(const Options& options)
      : trusted_(options.trust_plan),
        index_(gpu_index(options.device.empty() ? "cuda" : options.device)),
        options_(options) {
    if (index_ < 0) throw InvalidArgument("device must be cuda or cuda:N for tensorrt; got 'cpu'");
  }

  /// Hashed, trusted, of this version, of this GPU, in this order, before TensorRT sees a byte.
  std::unique_ptr<Session> open(const Manifest& manifest, const std::string& folder, const std::string& name) override {
    const Graph& graph = manifest.graphs.at(name);
    const Bytes plan = read_file(folder, graph.file, graph.sha256);
    if (!trusted_ && !built_here(graph.sha256)) {
      throw FolderError(text(folder, "/", graph.file,
                             ": a plan is executable code and this one was not built by you here; build it (python -m "
                             "engine.build) or, if you trust its source, set Options::trust_plan"));
    }
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
    if (driver_ == nullptr) driver_ = std::make_shared<const Driver>(index_);
    driver_->activate();
    if (!manifest.architecture.empty() && manifest.architecture != driver_->architecture()) {
      throw FolderError(text(folder, ": built for ", manifest.architecture, ", this GPU is ", driver_->architecture(),
                             "; ", rebuild));
    }
    return std::make_unique<TensorRtSession>(nvinfer_, driver_, graph, plan);
  }

  const std::string& version() const override { return nvinfer_->version; }

 private:
  bool trusted_;
  int index_;
  Options options_;
  std::shared_ptr<Nvinfer> nvinfer_;
  std::shared_ptr<const Driver> driver_;
};

}  // namespace

std::unique_ptr<Backend> tensorrt_backend(const Options& options) { return std::make_unique<TensorRtBackend>(options); }

}  // namespace gdpo::detail
