#include "devices/cuda/cuda.hpp"

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
  const auto message =
      text(what, ": ", reason != nullptr ? reason : "unknown error", " (", static_cast<int>(code), ")");
  if (code == CUDA_ERROR_OUT_OF_MEMORY) throw NoMemory(message);
  throw BackendError(message);
}

void Driver::activate() const { check(p_cuCtxSetCurrent(context_), "cuCtxSetCurrent"); }

std::string Driver::architecture() const {
  int major = 0, minor = 0;
  check(p_cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_), "cuDeviceGetAttribute");
  check(p_cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_), "cuDeviceGetAttribute");
  return text("sm_", major, minor);
}

Stream::Stream(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {
  driver_->activate();
  driver_->check(driver_->p_cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
}

Stream::~Stream() {
  driver_->enter();
  driver_->p_cuStreamDestroy(stream_);
}

void Stream::synchronize() const { driver_->check(driver_->p_cuStreamSynchronize(stream_), "cuStreamSynchronize"); }

void Stream::upload(CUdeviceptr to, const void* from, std::size_t bytes) const {
  driver_->check(driver_->p_cuMemcpyHtoDAsync(to, from, bytes, stream_), "cuMemcpyHtoDAsync");
}

void Stream::download(void* to, CUdeviceptr from, std::size_t bytes) const {
  driver_->check(driver_->p_cuMemcpyDtoHAsync(to, from, bytes, stream_), "cuMemcpyDtoHAsync");
}

void Stream::zero(CUdeviceptr at, std::size_t bytes) const {
  driver_->check(driver_->p_cuMemsetD8Async(at, 0, bytes, stream_), "cuMemsetD8Async");
}

Event::Event(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {
  driver_->activate();
  driver_->check(driver_->p_cuEventCreate(&event_, CU_EVENT_DEFAULT), "cuEventCreate");
}

Event::~Event() {
  driver_->enter();
  driver_->p_cuEventDestroy(event_);
}

void Event::record(const Stream& stream) const {
  driver_->check(driver_->p_cuEventRecord(event_, stream.get()), "cuEventRecord");
}

void Event::synchronize() const { driver_->check(driver_->p_cuEventSynchronize(event_), "cuEventSynchronize"); }

double Event::seconds_since(const Event& begin) const {
  float milliseconds = 0;
  driver_->check(driver_->p_cuEventElapsedTime(&milliseconds, begin.event_, event_), "cuEventElapsedTime");
  return milliseconds / 1e3;
}

CudaMemory::CudaMemory(std::shared_ptr<const Driver> driver, Kind kind, std::size_t bytes)
    : driver_(std::move(driver)), kind_(kind), bytes_(bytes) {
  if (kind == device) {
    driver_->check(driver_->p_cuMemAlloc(&device_, bytes), "cuMemAlloc");
  } else {
    driver_->check(driver_->p_cuMemHostAlloc(&host_, bytes, 0), "cuMemHostAlloc");
  }
}

CudaMemory::~CudaMemory() {
  driver_->enter();
  if (kind_ == device) {
    driver_->p_cuMemFree(device_);
  } else {
    driver_->p_cuMemFreeHost(host_);
  }
}

}  // namespace gdpo::detail
