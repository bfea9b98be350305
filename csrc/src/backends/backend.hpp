/// Sessions: one graph on one backend.
#pragma once

#include <cstdint>
#include <gdpo/upscaler.hpp>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "folder/manifest.hpp"

namespace gdpo::detail {

using Shape = std::vector<std::int64_t>;

/// float32 planes in the caller's memory.
struct Feed {
  const float* data;
  Shape shape;
  std::size_t count() const { return elements(shape[0], shape[1], shape[2], shape[3]); }
};

/// Where a session's inputs belong and where its output comes.
struct Slots {
  std::vector<float*> inputs;
  float* output = nullptr;
};

/// A session whose inputs and output can stay in the GPU's memory. The caller holds the GPU's lock (cuda.hpp).
class DeviceSession {
 public:
  virtual ~DeviceSession() = default;

  /// The slots of these shapes, valid until they are asked for again.
  virtual Slots slots(const std::vector<Shape>& inputs, const Shape& output) = 0;

  /// Start a run from and to the slots last asked for, on the GPU's stream.
  virtual void start() = 0;
};

/// One loaded graph. `run` may be called from many threads.
class Session {
 public:
  virtual ~Session() = default;

  /// @param inputs in the order of the manifest
  /// @param output room for `shape`
  virtual void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) = 0;

  /// Itself, where it runs on a GPU whose memory kernels can reach.
  virtual DeviceSession* on_device() { return nullptr; }
};

/// A loaded folder.
struct Model {
  Manifest manifest;
  std::map<std::string, std::unique_ptr<Session>> sessions;  ///< by the graph's name

  /// Encoder, unet and decoder, not one generator.
  bool staged() const { return sessions.count("generator") == 0; }
};

struct Job;
class Device;

/// A GPU that does all of the work on a picture, not only the sessions'.
class Accelerator {
 public:
  virtual ~Accelerator() = default;

  /// @return null: the GPU has no room for the picture
  virtual std::unique_ptr<Device> device(const Job& job) = 0;
};

/// A backend that was found, ready to load graphs.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::unique_ptr<Session> open(const Manifest& manifest, const std::string& folder,
                                        const std::string& graph) = 0;
  virtual const std::string& version() const = 0;

  /// For the sessions that were opened, or null.
  virtual std::shared_ptr<Accelerator> accelerator() { return nullptr; }
};

/// The N of "cuda:N", 0 for "cuda", -1 for "cpu". @throws InvalidArgument: another device
int gpu_index(const std::string& device);

/// @throws BackendError: its library is not here; the message names the remedy
std::unique_ptr<Backend> onnxruntime_backend(const Options& options);
std::unique_ptr<Backend> tensorrt_backend(const Options& options);

}  // namespace gdpo::detail
