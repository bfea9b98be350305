#include "cuda.hpp"

#include "common.hpp"

namespace gdpo::detail {

Driver::Driver(int index) : library_({"libcuda.so.1"}) {
  if (!library_.found()) {
    throw BackendError("no NVIDIA driver on this machine (libcuda.so.1): a TensorRT plan needs an NVIDIA GPU");
  }
#define GDPO_FIND(name, symbol)                                          \
  p_##name = reinterpret_cast<decltype(&::name)>(library_.find(symbol)); \
  if (p_##name == nullptr) throw BackendError("libcuda.so.1 has no " symbol "; install a newer driver");
  GDPO_CUDA_FUNCTIONS(GDPO_FIND)
#undef GDPO_FIND
  int count = 0;
  check(p_cuInit(0), "cuInit");
  check(p_cuDeviceGetCount(&count), "cuDeviceGetCount");
  if (index < 0 || index >= count) {
    throw BackendError(text("device cuda:", index, ": this machine has ", count, " NVIDIA GPU(s)"));
  }
  check(p_cuDeviceGet(&device_, index), "cuDeviceGet");
  check(p_cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Driver::~Driver() { p_cuDevicePrimaryCtxRelease(device_); }

void Driver::check(CUresult code, const char* what) const {
  if (code == CUDA_SUCCESS) return;
  const char* reason = nullptr;
  p_cuGetErrorString(code, &reason);
  throw BackendError(text(what, ": ", reason != nullptr ? reason : "unknown error", " (", static_cast<int>(code), ")"));
}

void Driver::activate() const { check(p_cuCtxSetCurrent(context_), "cuCtxSetCurrent"); }

std::string Driver::architecture() const {
  int major = 0, minor = 0;
  check(p_cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_), "cuDeviceGetAttribute");
  check(p_cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_), "cuDeviceGetAttribute");
  return text("sm_", major, minor);
}

DeviceBuffer::DeviceBuffer(std::shared_ptr<const Driver> driver, std::size_t floats)
    : driver_(std::move(driver)), bytes_(floats * sizeof(float)) {
  driver_->check(driver_->p_cuMemAlloc(&device_, bytes_), "cuMemAlloc");
  const CUresult pinned = driver_->p_cuMemHostAlloc(&host_, bytes_, 0);
  if (pinned != CUDA_SUCCESS) driver_->p_cuMemFree(device_);  // a constructor that throws is not destroyed
  driver_->check(pinned, "cuMemHostAlloc");
}

DeviceBuffer::~DeviceBuffer() {
  driver_->p_cuMemFree(device_);
  driver_->p_cuMemFreeHost(host_);
}

void DeviceBuffer::upload(CUstream stream) const {
  driver_->check(driver_->p_cuMemcpyHtoDAsync(device_, host_, bytes_, stream), "cuMemcpyHtoDAsync");
}

void DeviceBuffer::download(CUstream stream) const {
  driver_->check(driver_->p_cuMemcpyDtoHAsync(host_, device_, bytes_, stream), "cuMemcpyDtoHAsync");
}

}  // namespace gdpo::detail
