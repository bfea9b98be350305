/// The calls of the CUDA driver that inference needs, found at run time: libcuda comes with the driver.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <gdpo/error.hpp>
#include <memory>
#include <mutex>
#include <string>

#include "backends/library.hpp"

namespace gdpo::detail {

// X(name in cuda.h, symbol in libcuda)
#define GDPO_CUDA_FUNCTIONS(X)                                  \
  X(cuInit, "cuInit")                                           \
  X(cuGetErrorString, "cuGetErrorString")                       \
  X(cuDeviceGetCount, "cuDeviceGetCount")                       \
  X(cuDeviceGet, "cuDeviceGet")                                 \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute")               \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain")       \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2")  \
  X(cuCtxSetCurrent, "cuCtxSetCurrent")                         \
  X(cuStreamCreate, "cuStreamCreate")                           \
  X(cuStreamDestroy, "cuStreamDestroy_v2")                      \
  X(cuStreamSynchronize, "cuStreamSynchronize")                 \
  X(cuStreamBeginCapture, "cuStreamBeginCapture_v2")            \
  X(cuStreamEndCapture, "cuStreamEndCapture")                   \
  X(cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags") \
  X(cuGraphLaunch, "cuGraphLaunch")                             \
  X(cuGraphDestroy, "cuGraphDestroy")                           \
  X(cuGraphExecDestroy, "cuGraphExecDestroy")                   \
  X(cuModuleLoadData, "cuModuleLoadData")                       \
  X(cuModuleUnload, "cuModuleUnload")                           \
  X(cuModuleGetFunction, "cuModuleGetFunction")                 \
  X(cuLaunchKernel, "cuLaunchKernel")                           \
  X(cuEventCreate, "cuEventCreate")                             \
  X(cuEventDestroy, "cuEventDestroy_v2")                        \
  X(cuEventRecord, "cuEventRecord")                             \
  X(cuEventSynchronize, "cuEventSynchronize")                   \
  X(cuEventElapsedTime, "cuEventElapsedTime")                   \
  X(cuMemGetInfo, "cuMemGetInfo_v2")                            \
  X(cuMemAlloc, "cuMemAlloc_v2")                                \
  X(cuMemFree, "cuMemFree_v2")                                  \
  X(cuMemHostAlloc, "cuMemHostAlloc")                           \
  X(cuMemFreeHost, "cuMemFreeHost")                             \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2")                  \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2")                  \
  X(cuMemsetD8Async, "cuMemsetD8Async")

/// The GPU has no such piece of memory left.
class NoMemory : public BackendError {
 public:
  using BackendError::BackendError;
};

/// libcuda with one GPU's primary context.
class Driver {
 public:
  /// @throws BackendError: no driver, or no such GPU
  explicit Driver(int index);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  /// @throws BackendError where a call failed, NoMemory where that is why
  void check(CUresult code, const char* what) const;

  /// Make this context the calling thread's.
  void activate() const;

  /// The same in destructors, which have nobody to tell.
  void enter() const noexcept { p_cuCtxSetCurrent(context_); }

  /// The GPU's, such as "sm_90".
  std::string architecture() const;

#define GDPO_MEMBER(name, symbol) decltype(&::name) p_##name = nullptr;
  GDPO_CUDA_FUNCTIONS(GDPO_MEMBER)
#undef GDPO_MEMBER

 private:
  Library library_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

/// A stream that ends with its owner.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const Driver> driver);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  CUstream get() const { return stream_; }
  void synchronize() const;
  void upload(CUdeviceptr to, const void* from, std::size_t bytes) const;
  void download(void* to, CUdeviceptr from, std::size_t bytes) const;
  void zero(CUdeviceptr at, std::size_t bytes) const;

 private:
  std::shared_ptr<const Driver> driver_;
  CUstream stream_ = nullptr;
};

/// A moment on the stream.
class Event {
 public:
  explicit Event(std::shared_ptr<const Driver> driver);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(const Stream& stream) const;
  void synchronize() const;
  double seconds_since(const Event& begin) const;  ///< once the stream has passed both

 private:
  std::shared_ptr<const Driver> driver_;
  CUevent event_ = nullptr;
};

/// A GPU, its stream, and the lock that whoever puts work on it holds: plans and kernels of one picture share the
/// stream.
struct Gpu {
  explicit Gpu(int index) : driver(std::make_shared<const Driver>(index)), stream(driver) {}
  const std::shared_ptr<const Driver> driver;
  const Stream stream;
  std::mutex mutex;
};

/// Memory of the device, or pinned memory of the host, that ends with its owner.
class CudaMemory {
 public:
  enum Kind { device, pinned };
  CudaMemory(std::shared_ptr<const Driver> driver, Kind kind, std::size_t bytes);
  ~CudaMemory();
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  std::size_t size() const { return bytes_; }
  CUdeviceptr address() const { return device_; }
  template <typename T = void>
  T* data() const {
    return kind_ == pinned ? static_cast<T*>(host_) : reinterpret_cast<T*>(device_);
  }

 private:
  std::shared_ptr<const Driver> driver_;
  Kind kind_;
  std::size_t bytes_;
  CUdeviceptr device_ = 0;
  void* host_ = nullptr;
};

}  // namespace gdpo::detail
