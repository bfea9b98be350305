/// The calls of the CUDA driver that inference needs, found at run time: libcuda comes with the driver.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <string>

#include "library.hpp"

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
  X(cuMemAlloc, "cuMemAlloc_v2")                                \
  X(cuMemFree, "cuMemFree_v2")                                  \
  X(cuMemHostAlloc, "cuMemHostAlloc")                           \
  X(cuMemFreeHost, "cuMemFreeHost")                             \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2")                  \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2")

/// libcuda with one GPU's primary context.
class Driver {
 public:
  /// @throws BackendError: no driver, or no such GPU
  explicit Driver(int index);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  /// @throws BackendError where a call failed
  void check(CUresult code, const char* what) const;

  /// Make this context the calling thread's.
  void activate() const;

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

/// Device memory with pinned host memory of the same size.
class DeviceBuffer {
 public:
  DeviceBuffer(std::shared_ptr<const Driver> driver, std::size_t floats);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  float* host() const { return static_cast<float*>(host_); }
  void* device() const { return reinterpret_cast<void*>(device_); }
  void upload(CUstream stream) const;
  void download(CUstream stream) const;

 private:
  std::shared_ptr<const Driver> driver_;
  std::size_t bytes_;
  CUdeviceptr device_ = 0;
  void* host_ = nullptr;
};

}  // namespace gdpo::detail
