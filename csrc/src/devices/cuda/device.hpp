/// A GPU as a device: a picture crosses the bus once in and once out, as the caller's samples.
#pragma once

#include "backends/backend.hpp"
#include "devices/cuda/cuda.hpp"

namespace gdpo::detail {

/// @param gpu whose stream the sessions' plans run on
/// @return null: the library holds no code for this GPU, the CPU does what is around the plans
std::shared_ptr<Accelerator> cuda_accelerator(std::shared_ptr<Gpu> gpu);

}  // namespace gdpo::detail
