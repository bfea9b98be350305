#include "picture/restore.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "picture/color.hpp"
#include "picture/noise.hpp"

namespace gdpo::detail {
namespace {

constexpr std::int64_t kMaxPixels = 1'000'000'000;

GDPO_CLONES void normalise(const float* __restrict line, float factor, std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = normalised(line[i], factor);
}

GDPO_CLONES bool finite(const float* values, std::size_t count) {
  std::uint32_t found = 0;
  for (std::size_t i = 0; i < count; ++i) found |= static_cast<std::uint32_t>(!is_finite(values[i]));
  return found == 0;
}

/// The blended latents of all tiles.
struct Field {
  Buffer<float> values;
  std::int64_t rows, columns;
};

class Run {
 public:
  Run(const Upscaler::Impl& up, const Plan& plan, const Resampler& in, float full, const Request& request,
      const Step& step, double* seconds)
      : up_(up),
        plan_(plan),
        geometry_(up.manifest.geometry),
        in_(in),
        full_(full),
        seed_(request.seed),
        step_(step),
        seconds_(seconds) {}

  Buffer<std::uint16_t> restore() {
    if (up_.sessions.count("generator") != 0) {
      return finish([this](const std::vector<Place>& places) {
        return call("generator", {images(places), noises(places)}, places, true);
      });
    }
    const Field latent = field([this](const std::vector<Place>& p) { return call("encoder", {images(p)}, p, false); });
    const Field noised =
        field([&](const std::vector<Place>& p) { return call("unet", {cut(latent, p), noises(p)}, p, false); });
    return finish([&](const std::vector<Place>& p) { return call("decoder", {cut(noised, p)}, p, true); });
  }

 private:
  /// Tiles of pictures, blended and quantised.
  Buffer<std::uint16_t> finish(const RunTiles& run) {
    const std::int64_t height = plan_.size.height, width = plan_.size.width;
    Buffer<std::uint16_t> out(elements(height, width, 3));
    blend(plan_.rows, plan_.columns, 3, geometry_.factor, plan_.batch, up_.pool, run,
          [&](std::int64_t first, const Planes& band) {
            up_.pool.run(ceil_div(std::max<std::int64_t>(std::min(band.rows, height - first), 0), 32),
                         [&](std::int64_t part) {
                           const std::int64_t last = std::min({band.rows, height - first, part * 32 + 32});
                           for (std::int64_t y = part * 32; y < last; ++y) {
                             for (int c = 0; c < 3; ++c) {
                               quantise(band.data + c * band.plane_stride + y * band.row_stride, width,
                                        out.data() + (first + y) * width * 3 + c, 3);
                             }
                           }
                         });
          });
    return out;
  }

  /// Latents of every tile, blended into a field that covers the last tiles' ends too.
  Field field(const RunTiles& run) {
    Axis rows = plan_.rows, columns = plan_.columns;
    rows.size = rows.end();
    columns.size = columns.end();
    const int channels = static_cast<int>(geometry_.channels);
    Field result{Buffer<float>(elements(channels, rows.size, columns.size)), rows.size, columns.size};
    blend(rows, columns, channels, 1, plan_.batch, up_.pool, run, [&](std::int64_t first, const Planes& band) {
      for (int c = 0; c < channels; ++c) {
        for (std::int64_t y = 0; y < band.rows; ++y) {
          std::memcpy(result.values.data() + (c * rows.size + first + y) * columns.size,
                      band.data + c * band.plane_stride + y * band.row_stride, sizeof(float) * columns.size);
        }
      }
    });
    return result;
  }

  /// make(place, tile) for each place. A row's last tiles may be fewer than the least batch: the last one fills up.
  template <typename Make>
  Feed tiles(Buffer<float>& buffer, const std::vector<Place>& places, std::int64_t channels, std::int64_t resolution,
             const Make& make) {
    const Shape all = shape(places, channels, resolution);
    float* const out = room(buffer, all);
    const std::size_t tile = elements(all[1], all[2], all[3]);
    for (std::size_t i = 0; i < places.size(); ++i) make(places[i], out + i * tile);
    for (std::size_t i = places.size(); i < static_cast<std::size_t>(all[0]); ++i) {
      std::memcpy(out + i * tile, out + (i - 1) * tile, sizeof(float) * tile);
    }
    return {out, all};
  }

  Feed images(const std::vector<Place>& places) {
    const std::int64_t f = geometry_.factor, height = plan_.rows.tile * f, width = plan_.columns.tile * f;
    const float factor = 2.0f / full_;
    return tiles(first_, places, 3, f, [&](const Place& place, float* planes) {
      const Range rows{place.top * f, place.top * f + height}, columns{place.left * f, place.left * f + width};
      in_.window(rows, columns, up_.pool, [&](std::int64_t first, std::int64_t count, const float* band) {
        for (int c = 0; c < 3; ++c) {
          normalise(band + c * count * width, factor, count * width, planes + (c * height + first) * width);
        }
      });
    });
  }

  Feed noises(const std::vector<Place>& places) {
    const std::int64_t height = plan_.rows.tile, width = plan_.columns.tile;
    return tiles(second_, places, geometry_.channels, 1, [&](const Place& place, float* planes) {
      noise_field(seed_, static_cast<int>(geometry_.channels), {place.top, place.top + height},
                  {place.left, place.left + width}, planes, up_.pool);
    });
  }

  Feed cut(const Field& field, const std::vector<Place>& places) {
    const std::int64_t height = plan_.rows.tile, width = plan_.columns.tile, channels = geometry_.channels;
    return tiles(first_, places, channels, 1, [&](const Place& place, float* planes) {
      for (std::int64_t line = 0; line < channels * height; ++line, planes += width) {
        const std::int64_t row = line / height * field.rows + place.top + line % height;
        std::memcpy(planes, field.values.data() + row * field.columns + place.left, sizeof(float) * width);
      }
    });
  }

  const float* call(const char* name, const std::vector<Feed>& inputs, const std::vector<Place>& places, bool picture) {
    const std::int64_t f = geometry_.factor;
    const Shape result = shape(places, picture ? 3 : geometry_.channels, picture ? f : 1);
    float* const out = room(result_, result);
    const auto begin = std::chrono::steady_clock::now();
    up_.sessions.at(name)->run(inputs, out, result);
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const std::size_t tile = elements(result[1], result[2], result[3]);
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (!finite(out + i * tile, tile)) throw_not_finite(up_, plan_, name, places[i]);
    }
    step_(static_cast<std::int64_t>(places.size()));
    return out;
  }

  Shape shape(const std::vector<Place>& places, std::int64_t channels, std::int64_t resolution) const {
    return {std::max(static_cast<std::int64_t>(places.size()), up_.manifest.batch[0]), channels,
            plan_.rows.tile * resolution, plan_.columns.tile * resolution};
  }

  /// Memory that is kept from call to call.
  static float* room(Buffer<float>& buffer, const Shape& shape) {
    const std::size_t needed = elements(shape[0], shape[1], shape[2], shape[3]);
    if (buffer.size() < needed) {
      buffer = Buffer<float>();
      buffer = Buffer<float>(needed);
    }
    return buffer.data();
  }

  const Upscaler::Impl& up_;
  const Plan& plan_;
  const Geometry& geometry_;
  const Resampler& in_;
  const float full_;
  const std::uint64_t seed_;
  const Step& step_;
  double* const seconds_;
  Buffer<float> first_, second_, result_;
};

}  // namespace

void throw_not_finite(const Upscaler::Impl& up, const Plan& plan, const char* graph, const Place& place) {
  const std::int64_t f = up.manifest.geometry.factor;
  throw NotFinite(text("the ", graph, " gave a value that is not finite in the tile at row ", place.top * f,
                       ", column ", place.left * f, " (", plan.rows.tile * f, "x", plan.columns.tile * f,
                       " output pixels); try another precision"));
}

Plan::Plan(const Manifest& manifest, Size in, const Request& request) {
  const auto& geometry = manifest.geometry;
  const auto& profile = manifest.tile;
  const std::int64_t unit = geometry.factor, multiple = geometry.multiple / unit;
  size = {in.height * geometry.scale, in.width * geometry.scale};
  if (static_cast<double>(size.height) * static_cast<double>(size.width) > static_cast<double>(kMaxPixels)) {
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

Buffer<std::uint16_t> restore(const Upscaler::Impl& up, const Plan& plan, const Resampler& in, float full,
                              const Request& request, const Step& step, double* backend_seconds) {
  return Run(up, plan, in, full, request, step, backend_seconds).restore();
}

}  // namespace gdpo::detail
