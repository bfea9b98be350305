/// The CUDA kernels: kernels.hpp says what a thread does. Compiled by nvcc alone to one fat binary (cmake/cuda.cmake),
/// with -fmad=false: a fused multiply-add would round once where the CPU rounds twice.
#include "devices/cuda/kernels.hpp"

namespace gdpo::detail {

__device__ inline Thread here() {
  return {static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x, blockIdx.y, blockIdx.z, gridDim.y, gridDim.z};
}

#define GDPO_DEFINE(Kernel, name)                                                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 8) name(const __grid_constant__ Kernel kernel) { \
    each(kernel, here());                                                                                 \
  }
GDPO_KERNELS(GDPO_DEFINE)

/// Integers add up to the same in any order. A warp adds its own first, to spare the memory.
extern "C" __global__ void __launch_bounds__(kThreads, 8) gdpo_sums(const __grid_constant__ Sums kernel) {
  std::uint64_t own[12] = {};
  gather(kernel, here(), own);
  for (int i = 0; i < 12; ++i) {
    auto sum = static_cast<unsigned long long>(own[i]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, step);
    if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(kernel.sums + i), sum);
  }
}

}  // namespace gdpo::detail
