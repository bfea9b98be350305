/// The compiled CUDA kernels on a GPU.
#pragma once

#include <algorithm>
#include <map>
#include <string>

#include "devices/cuda/cuda.hpp"
#include "devices/cuda/kernels.hpp"

namespace gdpo::detail {

/// The kernels are one fat binary inside the library, loaded through the driver: cudart would be a second way to the
/// GPU beside the driver that cuda.hpp finds at run time, and without a GPU there is nothing to load it for.
class Kernels {
 public:
  /// @return null: no code for this GPU
  static std::unique_ptr<const Kernels> load(std::shared_ptr<const Driver> driver);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  /// Start a kernel over its extent.
  template <typename Kernel>
  void launch(const Stream& stream, Kernel kernel) const {
    launch(stream, kernel_name(kernel), kernel.extent, kMostBlocks, &kernel);
  }
  void launch(const Stream& stream, Sums kernel) const {  // its threads take many rows, so that few sums meet
    launch(stream, kernel_name(kernel), kernel.extent, 64, &kernel);
  }

 private:
  explicit Kernels(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {}

  static constexpr std::int64_t kMostBlocks = 65535;  // of a grid, along y and along z

  void launch(const Stream& stream, const char* name, const Extent& extent, std::int64_t rows, void* kernel) const;

  std::shared_ptr<const Driver> driver_;
  CUmodule module_ = nullptr;
  std::map<std::string, CUfunction> functions_;
};

}  // namespace gdpo::detail
