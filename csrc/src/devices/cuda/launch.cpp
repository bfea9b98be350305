#include "devices/cuda/launch.hpp"

#include "common.hpp"

#ifndef GDPO_KERNELS_FILE
#error "GDPO_KERNELS_FILE must name the fat binary of kernels.cu"
#endif

// The assembler copies the file.
__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".hidden gdpo_kernels\n"
    ".globl gdpo_kernels\n"
    "gdpo_kernels:\n"
    ".incbin \"" GDPO_KERNELS_FILE
    "\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char gdpo_kernels[];

namespace gdpo::detail {

std::unique_ptr<const Kernels> Kernels::load(std::shared_ptr<const Driver> driver) {
  driver->activate();
  std::unique_ptr<Kernels> made(new Kernels(driver));
  const CUresult loaded = driver->p_cuModuleLoadData(&made->module_, gdpo_kernels);
  if (loaded == CUDA_ERROR_NO_BINARY_FOR_GPU || loaded == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) return nullptr;
  driver->check(loaded,
                "the CUDA kernels do not load (a driver of this library's CUDA or newer loads them, and "
                "-DGDPO_CUDA=OFF builds the library without)");
#define GDPO_FIND(Kernel, name) \
  driver->check(driver->p_cuModuleGetFunction(&made->functions_[#name], made->module_, #name), #name);
  GDPO_KERNELS(GDPO_FIND)
  GDPO_FIND(Sums, gdpo_sums)
#undef GDPO_FIND
  return made;
}

Kernels::~Kernels() {
  driver_->enter();
  if (module_ != nullptr) driver_->p_cuModuleUnload(module_);
}

void Kernels::launch(const Stream& stream, const char* name, const Extent& extent, std::int64_t rows,
                     void* kernel) const {
  if (extent.planes < 1 || extent.rows < 1 || extent.columns < 1) return;
  const auto x = static_cast<unsigned>(ceil_div(extent.columns, kThreads));
  const auto y = static_cast<unsigned>(std::min(extent.rows, rows));
  const auto z = static_cast<unsigned>(std::min(extent.planes, kMostBlocks));
  void* parameters[] = {kernel};
  driver_->check(
      driver_->p_cuLaunchKernel(functions_.at(name), x, y, z, kThreads, 1, 1, 0, stream.get(), parameters, nullptr),
      name);
}

}  // namespace gdpo::detail
