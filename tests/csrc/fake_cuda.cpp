/// Stands in for libcuda.so.1 where there is no GPU: device memory is host memory, a stream does everything at once but
/// copies to the host, and a kernel is what kernels.hpp says, called for every thread of the grid. It lets tests run
/// all of the library's code around the kernels, and the kernels' own arithmetic; what it cannot show is what nvcc and
/// a GPU make of them.
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "devices/cuda/kernels.hpp"

#undef cuEventElapsedTime  // the library asks for the first version, which every driver has

using namespace gdpo::detail;

namespace {

struct Grid {
  unsigned x, y, z, threads;
};
using Run = std::function<void(const Grid&, const void*)>;

template <typename Kernel, typename Work>
void for_threads(const Grid& grid, const void* parameter, const Work& work) {
  Kernel kernel;
  std::memcpy(static_cast<void*>(&kernel), parameter, sizeof kernel);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x * grid.threads; ++x) work(kernel, Thread{x, y, z, grid.y, grid.z});
    }
  }
}

template <typename Kernel>
Run run_each() {
  return [](const Grid& grid, const void* parameter) {
    for_threads<Kernel>(grid, parameter, [](const Kernel& kernel, const Thread& thread) { each(kernel, thread); });
  };
}

const std::map<std::string, Run>& kernels() {
#define GDPO_ENTRY(Kernel, name) {#name, run_each<Kernel>()},
  static const std::map<std::string, Run> all = {
      GDPO_KERNELS(GDPO_ENTRY){"gdpo_sums", [](const Grid& grid, const void* parameter) {
                                 for_threads<Sums>(grid, parameter, [](const Sums& kernel, const Thread& thread) {
                                   std::uint64_t own[12] = {};
                                   gather(kernel, thread, own);
                                   for (int i = 0; i < 12; ++i) kernel.sums[i] += own[i];
                                 });
                               }}};
#undef GDPO_ENTRY
  return all;
}

using Graph = std::vector<std::function<void()>>;
Graph* captured = nullptr;  // of the stream, while it is recorded

/// Copies to the host are as late as they may be: somebody waits for them, or other work is put behind them.
struct Late {
  CUevent event;  // a moment between copies, or none
  std::function<void()> copy;
};
std::deque<Late> late;

void catch_up(CUevent until = nullptr) {
  while (!late.empty()) {
    const Late next = std::move(late.front());
    late.pop_front();
    if (next.copy) next.copy();
    if (until != nullptr && next.event == until) return;
  }
}

}  // namespace

/// What another stand-in puts on the stream.
void fake_cuda_submit(std::function<void()> work) {
  catch_up();
  if (captured == nullptr) return work();
  captured->push_back(std::move(work));
}

extern "C" {

// What tests ask.
std::int64_t fake_cuda_up = 0, fake_cuda_down = 0;           // bytes that crossed the bus
std::int64_t fake_cuda_launches = 0, fake_cuda_replays = 0;  // of kernels, of recorded graphs
std::int64_t fake_cuda_live = 0;                             // things that were made and have not ended

/// Says at the end of the program what it did.
__attribute__((destructor)) void fake_cuda_report() {
  if (std::getenv("FAKE_CUDA_REPORT") == nullptr) return;
  std::fprintf(stderr, "launches=%lld replays=%lld live=%lld\n", static_cast<long long>(fake_cuda_launches),
               static_cast<long long>(fake_cuda_replays), static_cast<long long>(fake_cuda_live));
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream) { return catch_up(), CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream) { return late.push_back({event, {}}), CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent event) {
  const auto is = [&](const Late& one) { return one.event == event; };
  if (std::any_of(late.begin(), late.end(), is)) catch_up(event);
  return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream, CUstreamCaptureMode) {
  if (captured != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  captured = new Graph;
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  *graph = reinterpret_cast<CUgraph>(std::exchange(captured, nullptr));
  return ++fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph graph, unsigned long long) {
  *made = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return ++fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  delete reinterpret_cast<Graph*>(graph);
  return --fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec graph) { return cuGraphDestroy(reinterpret_cast<CUgraph>(graph)); }
CUresult cuGraphLaunch(CUgraphExec graph, CUstream) {
  ++fake_cuda_replays;
  catch_up();
  for (const auto& work : *reinterpret_cast<Graph*>(graph)) work();
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 9;
  return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime(float* milliseconds, CUevent, CUevent) {
  *milliseconds = 1;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream*, unsigned) { return ++fake_cuda_live, CUDA_SUCCESS; }
CUresult cuStreamDestroy(CUstream) { return --fake_cuda_live, CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent* event, unsigned) {
  static std::uintptr_t events = 0;
  *event = reinterpret_cast<CUevent>(++events);
  return ++fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent) { return --fake_cuda_live, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule) { return --fake_cuda_live, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (std::getenv("FAKE_CUDA_NO_CODE") != nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  constexpr std::uint32_t kFatBinary = 0xBA55ED50;
  if (std::memcmp(image, &kFatBinary, sizeof kFatBinary) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(&fake_cuda_live);
  return ++fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(const_cast<Run*>(&found->second));
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                        unsigned bz, unsigned shared, CUstream, void** parameters, void**) {
  if (captured != nullptr || x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || by != 1 || bz != 1 ||
      shared != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++fake_cuda_launches;
  catch_up();
  (*reinterpret_cast<const Run*>(function))({x, y, z, threads}, parameters[0]);
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(std::size_t* free, std::size_t* total) {
  const char* const value = std::getenv("FAKE_CUDA_FREE");
  *free = *total = value != nullptr ? std::strtoull(value, nullptr, 10) : std::size_t{8} << 30;
  return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** at, std::size_t bytes, unsigned) {
  *at = std::malloc(bytes);
  std::memset(*at, 0xFF, bytes);  // what is read before it is written is not a number
  return ++fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void* at) {
  catch_up();
  std::free(at);
  return --fake_cuda_live, CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr* at, std::size_t bytes) {
  const char* const largest = std::getenv("FAKE_CUDA_LARGEST");
  if (largest != nullptr && bytes > std::strtoull(largest, nullptr, 10)) return CUDA_ERROR_OUT_OF_MEMORY;
  return cuMemHostAlloc(reinterpret_cast<void**>(at), bytes, 0);
}
CUresult cuMemFree(CUdeviceptr at) { return cuMemFreeHost(reinterpret_cast<void*>(at)); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream) {
  catch_up();
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  fake_cuda_up += static_cast<std::int64_t>(bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream) {
  late.push_back({nullptr, [=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); }});
  fake_cuda_down += static_cast<std::int64_t>(bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, std::size_t bytes, CUstream) {
  catch_up();
  std::memset(reinterpret_cast<void*>(at), value, bytes);
  return CUDA_SUCCESS;
}

}  // extern "C"
