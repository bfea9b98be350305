#include "picture/tiles.hpp"

#include <algorithm>

namespace gdpo::detail {
std::vector<float> Axis::weights(std::int64_t resolution) const {
  const std::int64_t length = tile * resolution, margin = overlap * resolution / 4;
  const auto rise = static_cast<double>(std::max<std::int64_t>(overlap * resolution - 2 * margin, 1));
  std::vector<double> ramp(elements(length)), total(elements(end(), resolution)), shares(elements(count(), length), 1);
  for (std::int64_t i = 0; i < length; ++i) {
    const double t = std::clamp((static_cast<double>(i) + 0.5 - static_cast<double>(margin)) / rise, 0.0, 1.0);
    ramp[i] = t * t * (3.0 - 2.0 * t);
  }
  for (std::int64_t j = 0; j < count(); ++j) {
    double* const share = shares.data() + j * length;
    for (std::int64_t i = 0; i < length; ++i) {
      if (j > 0) share[i] *= ramp[i];
      if (j + 1 < count()) share[i] *= ramp[length - 1 - i];
      total[starts[j] * resolution + i] += share[i];
    }
  }
  std::vector<float> result(shares.size());
  for (std::int64_t j = 0; j < count(); ++j) {
    for (std::int64_t i = 0; i < length; ++i) {
      result[j * length + i] = static_cast<float>(shares[j * length + i] / total[starts[j] * resolution + i]);
    }
  }
  return result;
}

Axis cover(std::int64_t size, std::int64_t tile, std::int64_t overlap, std::int64_t multiple, bool fixed) {
  // In units of `multiple` everything is exact.
  const std::int64_t whole = ceil_div(size, multiple), shared = ceil_div(overlap, multiple);
  std::int64_t longest = tile / multiple;
  if (longest < 1) {
    throw InvalidArgument(text("a tile must be at least ", multiple, " latent pixels long; got ", tile));
  }
  if (whole <= longest) return {size, (fixed ? longest : whole) * multiple, {0}, overlap};
  if (longest <= shared) {
    throw InvalidArgument(
        text("a tile must be longer than its overlap of ", shared * multiple, " latent pixels; got ", tile));
  }
  const std::int64_t count = ceil_div(whole - shared, longest - shared);
  if (!fixed) longest = ceil_div(whole + (count - 1) * shared, count);
  Axis axis{size, longest * multiple, {}, overlap};
  for (std::int64_t i = 0; i < count; ++i) axis.starts.push_back(i * (whole - longest) / (count - 1) * multiple);
  return axis;
}

}  // namespace gdpo::detail
