#include "picture/plan.hpp"

#include <algorithm>

namespace gdpo::detail {

Plan::Plan(const Manifest& manifest, Size in, const Request& request) {
  const auto& geometry = manifest.geometry;
  const auto& profile = manifest.tile;
  const std::int64_t unit = geometry.factor, multiple = geometry.multiple / unit;
  size = {in.height * geometry.scale, in.width * geometry.scale};
  if (static_cast<double>(size.height) * static_cast<double>(size.width) > static_cast<double>(request.max_pixels)) {
    throw InvalidArgument(text(in.width, "x", in.height, " is more than this model can upscale"));
  }
  batch = request.batch == 0 ? manifest.batch[1] : request.batch;
  if (batch < manifest.batch[0] || batch > manifest.batch[2]) {
    throw InvalidArgument(
        text("batch must be ", manifest.batch[0], " to ", manifest.batch[2], " for this model; got ", batch));
  }
  std::int64_t longest = profile[1];
  if (request.tile != 0) {
    longest = request.tile * geometry.scale / geometry.multiple * geometry.multiple;
    if (longest < profile[0] || longest > profile[2]) {
      throw InvalidArgument(text("tile must be ", ceil_div(profile[0], geometry.scale), " to ",
                                 ceil_div(profile[2], geometry.scale), " input pixels for this model; got ",
                                 request.tile));
    }
  }
  // A short overlap for short tiles: at most a quarter.
  const std::int64_t overlap = std::min(geometry.overlap / unit, longest / unit / 4 / multiple * multiple);
  const auto axis = [&](std::int64_t side) {
    // At least the profile's least tile: a smaller picture is mirrored until it fills one.
    return cover(std::max(ceil_div(side, unit), profile[0] / unit), longest / unit, overlap, multiple,
                 manifest.fixed());
  };
  rows = axis(size.height);
  columns = axis(size.width);
  calls = rows.count() * columns.count() * static_cast<std::int64_t>(manifest.graphs.size());
}

}  // namespace gdpo::detail
