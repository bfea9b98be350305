#include "picture/tiles.hpp"

#include <algorithm>
#include <cstring>

namespace gdpo::detail {
namespace {

GDPO_CLONES void add_weighted(const float* __restrict tile, const float* __restrict across, float down,
                              std::int64_t count, float* __restrict band) {
  for (std::int64_t i = 0; i < count; ++i) band[i] += tile[i] * across[i] * down;
}

}  // namespace

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

void blend(const Axis& rows, const Axis& columns, int channels, std::int64_t resolution, std::int64_t batch, Pool& pool,
           const RunTiles& run, const TakeBand& take) {
  const auto down = rows.weights(resolution), across = columns.weights(resolution);
  const std::int64_t height = rows.size * resolution, width = columns.size * resolution;
  const std::int64_t tall = rows.tile * resolution, wide = columns.tile * resolution;
  const std::int64_t stride = columns.end() * resolution, plane = tall * stride;
  std::vector<float> band(elements(channels, tall, stride));
  std::vector<Place> places;
  for (std::int64_t i = 0; i < rows.count(); ++i) {
    for (std::int64_t j = 0; j < columns.count(); j += batch) {
      places.clear();
      for (std::int64_t k = j; k < std::min(j + batch, columns.count()); ++k) {
        places.push_back({rows.starts[i], columns.starts[k]});
      }
      const float* const tiles = run(places);
      pool.run(channels, [&](std::int64_t c) {
        for (std::size_t k = 0; k < places.size(); ++k) {
          const float* const tile = tiles + (static_cast<std::int64_t>(k) * channels + c) * tall * wide;
          float* const target = band.data() + c * plane + places[k].left * resolution;
          const float* const share = across.data() + (j + static_cast<std::int64_t>(k)) * wide;
          for (std::int64_t y = 0; y < tall; ++y) {
            add_weighted(tile + y * wide, share, down[i * tall + y], wide, target + y * stride);
          }
        }
      });
    }
    const bool last = i + 1 == rows.count();
    const std::int64_t done = last ? tall : (rows.starts[i + 1] - rows.starts[i]) * resolution;
    const std::int64_t first = rows.starts[i] * resolution;
    take(first, {band.data(), std::min(done, height - first), width, stride, plane});
    if (last) break;
    for (int c = 0; c < channels; ++c) {  // what the next tiles share moves up
      float* const target = band.data() + c * plane;
      std::memmove(target, target + done * stride, sizeof(float) * (tall - done) * stride);
      std::fill_n(target + (tall - done) * stride, done * stride, 0.0f);
    }
  }
}

}  // namespace gdpo::detail
