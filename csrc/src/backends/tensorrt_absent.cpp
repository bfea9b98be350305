/// Stands in for tensorrt.cpp where the library was built without TensorRT's headers.
#include "backends/backend.hpp"

namespace gdpo::detail {

std::unique_ptr<Backend> tensorrt_backend(const Options&) {
  throw BackendError(
      "this library was built without TensorRT; build it again with TENSORRT_ROOT set to a TensorRT 10 or 11 (its "
      "include/NvInfer.h) and the CUDA toolkit at hand, or use a folder built for onnxruntime");
}

}  // namespace gdpo::detail
