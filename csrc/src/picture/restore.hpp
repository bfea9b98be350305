/// One picture on its way through the model.
#pragma once

#include <functional>

#include "api/upscaler.hpp"
#include "picture/resample.hpp"
#include "picture/tiles.hpp"

namespace gdpo::detail {

/// How a picture is cut into tiles.
struct Plan {
  /// @throws InvalidArgument: a tile or a batch that the model does not take, or a picture too large
  Plan(const Manifest& manifest, Size in, const Request& request);

  Size size;  ///< of the upsampled picture
  Axis rows, columns;
  std::int64_t batch = 1;
  std::int64_t calls = 0;  ///< tiles times stages
};

/// The restored picture [H,W,3], colours not aligned yet.
/// @param in the input on its way to plan.size
/// @param full the largest value of an input sample
Buffer<std::uint16_t> restore(const Upscaler::Impl& up, const Plan& plan, const Resampler& in, float full,
                              const Request& request, const Step& step, double* backend_seconds);

/// Say which tile of a graph's output is not finite. @throws NotFinite, always
[[noreturn]] void throw_not_finite(const Upscaler::Impl& up, const Plan& plan, const char* graph, const Place& place);

}  // namespace gdpo::detail
