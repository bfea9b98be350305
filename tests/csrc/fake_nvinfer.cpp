/// Stands in for libnvinfer where TensorRT's headers are but no GPU is: a "plan" is the synthetic generator below, put
/// on the stream of fake_cuda.cpp. It lets a test run all of backends/tensorrt.cpp: shapes, buffers, graphs and
/// streams.
///
/// TensorRT's classes forward to abstract ones with dozens of functions. Only the few that the library calls are filled
/// in, in tables of the Itanium C++ ABI; any other call aborts.
#include <NvInferRuntime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>

using namespace nvinfer1;

void fake_cuda_submit(std::function<void()> work);  // fake_cuda.cpp

namespace {

[[noreturn]] void unexpected() { std::abort(); }

/// Stands for an object of an abstract class: a pointer to its functions, and what they need.
template <typename State>
struct Object {
  Object() {
    for (auto& function : functions) function = reinterpret_cast<void*>(&unexpected);
  }
  template <typename Member, typename Function>
  void set(Member member, Function function) {  // a pointer to a virtual member is 1 + its offset in the table
    std::uintptr_t offset;
    std::memcpy(&offset, &member, sizeof offset);
    functions[(offset - 1) / sizeof(void*)] = reinterpret_cast<void*>(function);
  }

  void** table = functions;
  State state;
  void* functions[512];
};

struct Binding {
  Dims dims{};
  float* data = nullptr;
};
using Bindings = std::map<std::string, Binding>;

/// output = 0.9 image + 0.05 noise at full resolution + what depends on the place in the tile.
void generate(const Bindings& bindings) {
  const auto& [dims, image] = bindings.at("image");
  const float* const noise = bindings.at("noise").data;
  float* const out = bindings.at("output").data;
  const std::int64_t rows = dims.d[2], columns = dims.d[3];
  for (std::int64_t n = 0; n < dims.d[0]; ++n) {
    for (std::int64_t c = 0; c < 3; ++c) {
      for (std::int64_t y = 0; y < rows; ++y) {
        for (std::int64_t x = 0; x < columns; ++x) {
          const std::int64_t i = ((n * 3 + c) * rows + y) * columns + x, plane = n * 48 + c * 16 + y % 4 * 4 + x % 4;
          out[i] = 0.9f * image[i] + 0.05f * noise[(plane * (rows / 4) + y / 4) * (columns / 4) + x / 4] +
                   0.01f * static_cast<float>((7 * y + 3 * x) % 11 - 5);
        }
      }
    }
  }
}

class Context : public IExecutionContext {
 public:
  Context() {
    object_.set(
        &apiv::VExecutionContext::setInputShape, +[](Object<Bindings>* self, const char* name, const Dims& dims) {
          self->state[name].dims = dims;
          return dims.nbDims == 4 && (self->state["profile"].dims.nbDims == 0 || dims.d[0] == 1);
        });
    object_.set(
        &apiv::VExecutionContext::setOptimizationProfileAsync,
        +[](Object<Bindings>* self, std::int32_t profile, cudaStream_t) {
          self->state["profile"].dims.nbDims = profile;
          if (std::getenv("FAKE_CUDA_REPORT") != nullptr) std::fprintf(stderr, "profile=%d\n", profile);
          return profile < 2;
        });
    object_.set(
        &apiv::VExecutionContext::setTensorAddress, +[](Object<Bindings>* self, const char* name, void* data) {
          self->state[name].data = static_cast<float*>(data);
          return true;
        });
    object_.set(
        &apiv::VExecutionContext::enqueueV3, +[](Object<Bindings>* self, cudaStream_t) {
          fake_cuda_submit([bindings = self->state] { generate(bindings); });
          return true;
        });
    mImpl = reinterpret_cast<apiv::VExecutionContext*>(&object_);
  }

 private:
  Object<Bindings> object_;
};

class Engine : public ICudaEngine {
 public:
  Engine() {
    using E = apiv::VCudaEngine;
    using Self = Object<int>*;
    object_.set(&E::getNbIOTensors, +[](Self) -> std::int32_t { return 3; });
    object_.set(
        &E::getIOTensorName, +[](Self, std::int32_t i) { return i == 0   ? "image"
                                                                : i == 1 ? "noise"
                                                                         : "output"; });
    object_.set(&E::getNbOptimizationProfiles, +[](Self) -> std::int32_t { return 2; });
    object_.set(&E::getTensorDataType, +[](Self, const char*) { return DataType::kFLOAT; });
    object_.set(
        &E::createExecutionContext,
        +[](Self, ExecutionContextAllocationStrategy) -> IExecutionContext* { return new Context; });
    mImpl = reinterpret_cast<E*>(&object_);
  }

 private:
  Object<int> object_;
};

class Runtime : public IRuntime {
 public:
  Runtime() {
    using Deserialize = ICudaEngine* (apiv::VRuntime::*)(const void*, std::size_t) noexcept;
    using Self = Object<int>*;
    object_.set(
        static_cast<Deserialize>(&apiv::VRuntime::deserializeCudaEngine),
        +[](Self, const void* plan, std::size_t size) -> ICudaEngine* {
          return size == 4 && std::memcmp(plan, "fake", 4) == 0 ? new Engine : nullptr;
        });
    object_.set(&apiv::VRuntime::setEngineHostCodeAllowed, +[](Self, bool) {});
    mImpl = reinterpret_cast<apiv::VRuntime*>(&object_);
  }

 private:
  Object<int> object_;
};

}  // namespace

extern "C" {
std::int32_t getInferLibVersion() noexcept { return NV_TENSORRT_MAJOR * 10000; }
void* createInferRuntime_INTERNAL(void*, std::int32_t) noexcept { return static_cast<IRuntime*>(new Runtime); }
}
