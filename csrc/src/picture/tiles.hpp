/// Overlapping tiles, blended smoothly: see engine/runtime/tiles.py, which has the same bits. Lengths are in latent
/// pixels.
#pragma once

#include <vector>

#include "common.hpp"

namespace gdpo::detail {

/// Tiles along one axis.
struct Axis {
  std::int64_t size = 0;             ///< what must be covered
  std::int64_t tile = 0;             ///< length of every tile
  std::vector<std::int64_t> starts;  ///< rising
  std::int64_t overlap = 0;          ///< the least of two neighbours

  std::int64_t count() const { return static_cast<std::int64_t>(starts.size()); }
  std::int64_t end() const { return starts.back() + tile; }

  /// Each tile's share of each of its samples, [tiles, tile * resolution].
  std::vector<float> weights(std::int64_t resolution) const;
};

/// Cover an axis with tiles, each at most `tile` long; `fixed`: each exactly.
/// @throws InvalidArgument: tiles so short that the overlap leaves nothing
Axis cover(std::int64_t size, std::int64_t tile, std::int64_t overlap, std::int64_t multiple, bool fixed);

}  // namespace gdpo::detail
