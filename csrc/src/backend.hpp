/// Sessions: one graph on one backend.
#pragma once

#include <cstdint>
#include <gdpo/upscaler.hpp>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace gdpo::detail {

using Shape = std::vector<std::int64_t>;

/// float32 planes in the caller's memory.
struct Feed {
  const float* data;
  Shape shape;
  std::size_t count() const { return elements(shape[0], shape[1], shape[2], shape[3]); }
};

/// One loaded graph. `run` may be called from many threads.
class Session {
 public:
  virtual ~Session() = default;

  /// @param inputs in the order of the manifest
  /// @param output room for `shape`
  virtual void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) = 0;
};

/// A backend that was found, ready to load graphs.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::unique_ptr<Session> open(const Manifest& manifest, const std::string& folder,
                                        const std::string& graph) = 0;
  virtual const std::string& version() const = 0;
};

/// The N of "cuda:N", 0 for "cuda", -1 for "cpu". @throws InvalidArgument: another device
int gpu_index(const std::string& device);

/// @throws BackendError: its library is not here; the message names the remedy
std::unique_ptr<Backend> onnxruntime_backend(const Options& options);
std::unique_ptr<Backend> tensorrt_backend(const Options& options);

}  // namespace gdpo::detail
