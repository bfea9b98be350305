/// One picture on its way through the model, on any device.
#pragma once

#include <functional>

#include "picture/device.hpp"

namespace gdpo::detail {

/// Called with the number of tiles that are done now.
using Step = std::function<void(std::int64_t)>;

/// Upscale a picture: LR -> resampled x4, mirrored beyond its edges -> tiles -> encode -> one step with noise from
/// (seed, position) -> decode -> blended -> colours aligned -> the caller's samples.
/// @param seconds in the backend, added up
/// @throws NotFinite, and what `step` throws
void restore(const Job& job, Device& device, const Step& step, double* seconds);

}  // namespace gdpo::detail
