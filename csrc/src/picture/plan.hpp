/// How a picture is cut into tiles.
#pragma once

#include <gdpo/upscaler.hpp>

#include "folder/manifest.hpp"
#include "picture/tiles.hpp"

namespace gdpo::detail {

struct Plan {
  /// @throws InvalidArgument: a tile or a batch that the model does not take, or a picture too large
  Plan(const Manifest& manifest, Size in, const Request& request);

  Size size;  ///< of the upsampled picture
  Axis rows, columns;
  std::int64_t batch = 1;
  std::int64_t calls = 0;  ///< tiles times stages
};

}  // namespace gdpo::detail
