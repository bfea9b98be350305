/// Overlapping tiles, blended smoothly: see engine/runtime/tiles.py, which has the same bits. Lengths are in latent
/// pixels.
#pragma once

#include <functional>
#include <vector>

#include "common.hpp"
#include "picture/parallel.hpp"

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

/// A tile's upper left corner.
struct Place {
  std::int64_t top, left;
};

/// Planes of floats, [channels, rows, columns].
struct Planes {
  const float* data;
  std::int64_t rows, columns, row_stride, plane_stride;  // strides in floats
};

/// Results of tiles in one row, [places, channels, tile, tile], valid until the next call.
using RunTiles = std::function<const float*(const std::vector<Place>&)>;
/// A finished band: its first row and the planes, cropped to the axes' sizes.
using TakeBand = std::function<void(std::int64_t first, const Planes& band)>;

/// Run every tile and hand on finished bands, from the top to the bottom.
void blend(const Axis& rows, const Axis& columns, int channels, std::int64_t resolution, std::int64_t batch, Pool& pool,
           const RunTiles& run, const TakeBand& take);

}  // namespace gdpo::detail
