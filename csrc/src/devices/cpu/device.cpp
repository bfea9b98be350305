#include "devices/cpu/device.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "picture/color.hpp"
#include "picture/noise.hpp"

namespace gdpo::detail {
namespace {

GDPO_CLONES void normalise(const float* __restrict line, float factor, std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = normalised(line[i], factor);
}

GDPO_CLONES bool finite(const float* values, std::size_t count) {
  std::uint32_t found = 0;
  for (std::size_t i = 0; i < count; ++i) found |= static_cast<std::uint32_t>(!is_finite(values[i]));
  return found == 0;
}

GDPO_CLONES void add_weighted(const float* __restrict tile, const float* __restrict across, float down,
                              std::int64_t count, float* __restrict band) {
  for (std::int64_t i = 0; i < count; ++i) band[i] += tile[i] * across[i] * down;
}

std::size_t volume(const Shape& shape) { return elements(shape[0], shape[1], shape[2], shape[3]); }

/// Memory that is kept from call to call.
float* room(Buffer<float>& buffer, const Shape& shape) {
  if (buffer.size() < volume(shape)) {
    buffer = Buffer<float>();
    buffer = Buffer<float>(volume(shape));
  }
  return buffer.data();
}

}  // namespace

CpuDevice::Band::Band(std::int64_t channels, std::int64_t resolution, std::int64_t ring, const Plan& plan)
    : channels(channels),
      resolution(resolution),
      ring(ring),
      columns(plan.columns.end() * resolution),
      down(plan.rows.weights(resolution)),
      across(plan.columns.weights(resolution)),
      values(elements(channels, ring, columns)) {
  std::fill_n(values.data(), values.size(), 0.0f);
}

CpuDevice::CpuDevice(const Job& job, Pool& pool)
    : job_(job),
      pool_(pool),
      geometry_(job.model.manifest.geometry),
      in_(job.in, job.plan.size),
      finish_(job, in_, pool) {}

CpuDevice::Band& CpuDevice::band(Target target) {
  auto& band = bands_[static_cast<int>(target)];
  if (band == nullptr) {  // a field of latents is kept whole, of the picture what the tiles of one row cover
    const bool picture = target == Target::picture;
    const std::int64_t f = picture ? geometry_.factor : 1, channels = picture ? 3 : geometry_.channels;
    const std::int64_t ring = picture ? job_.plan.rows.tile * f : job_.plan.rows.end();
    band = std::make_unique<Band>(channels, f, ring, job_.plan);
  }
  return *band;
}

Slots CpuDevice::slots(Session&, const std::vector<Shape>& inputs, const Shape& output) {
  Slots slots;
  feeds_.clear();
  if (inputs_.size() < inputs.size()) inputs_.resize(inputs.size());
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    slots.inputs.push_back(room(inputs_[i], inputs[i]));
    feeds_.push_back({slots.inputs[i], inputs[i]});
  }
  slots.output = room(output_, output);
  shape_ = output;
  return slots;
}

template <typename Make>
void CpuDevice::each(const Tiles& tiles, std::int64_t channels, std::int64_t resolution, float* slot,
                     const Make& make) const {
  const auto& [rows, columns] = std::tie(job_.plan.rows, job_.plan.columns);
  const std::size_t tile = elements(channels, rows.tile * resolution, columns.tile * resolution);
  for (std::int64_t k = 0; k < tiles.batch; ++k, slot += tile) {
    if (k < tiles.count) {
      make(rows.starts[tiles.row], columns.starts[tiles.column + k], slot);
    } else {
      std::memcpy(slot, slot - tile, sizeof(float) * tile);
    }
  }
}

void CpuDevice::images(const Tiles& tiles, float* slot) {
  const std::int64_t f = geometry_.factor, height = job_.plan.rows.tile * f, width = job_.plan.columns.tile * f;
  const float factor = 2.0f / job_.full();
  each(tiles, 3, f, slot, [&](std::int64_t top, std::int64_t left, float* planes) {
    const Range rows{top * f, top * f + height}, columns{left * f, left * f + width};
    in_.window(rows, columns, pool_, [&](std::int64_t first, std::int64_t count, const float* band) {
      for (int c = 0; c < 3; ++c) {
        normalise(band + c * count * width, factor, count * width, planes + (c * height + first) * width);
      }
    });
  });
}

void CpuDevice::noise(const Tiles& tiles, float* slot) {
  const std::int64_t height = job_.plan.rows.tile, width = job_.plan.columns.tile;
  each(tiles, geometry_.channels, 1, slot, [&](std::int64_t top, std::int64_t left, float* planes) {
    noise_field(job_.request.seed, static_cast<int>(geometry_.channels), {top, top + height}, {left, left + width},
                planes, pool_);
  });
}

void CpuDevice::cut(Target field, const Tiles& tiles, float* slot) {
  const Band& from = band(field);
  const std::int64_t height = job_.plan.rows.tile, width = job_.plan.columns.tile;
  each(tiles, geometry_.channels, 1, slot, [&](std::int64_t top, std::int64_t left, float* planes) {
    for (std::int64_t line = 0; line < geometry_.channels * height; ++line, planes += width) {
      const std::int64_t row = line / height * from.ring + top + line % height;
      std::memcpy(planes, from.values.data() + row * from.columns + left, sizeof(float) * width);
    }
  });
}

void CpuDevice::run(Session& session) {
  const auto begin = std::chrono::steady_clock::now();
  session.run(feeds_, output_.data(), shape_);
  seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void CpuDevice::blend(Target target, const Tiles& tiles, const float* output) {
  Band& to = band(target);
  const std::int64_t tall = job_.plan.rows.tile * to.resolution, wide = job_.plan.columns.tile * to.resolution;
  const std::int64_t top = job_.plan.rows.starts[tiles.row] * to.resolution;
  const float* const down = to.down.data() + tiles.row * tall;
  pool_.run(to.channels, [&](std::int64_t c) {
    for (std::int64_t k = 0; k < tiles.count; ++k) {
      const float* const tile = output + (k * to.channels + c) * tall * wide;
      const float* const across = to.across.data() + (tiles.column + k) * wide;
      const std::int64_t left = job_.plan.columns.starts[tiles.column + k] * to.resolution;
      for (std::int64_t y = 0; y < tall; ++y) {
        float* const row = to.values.data() + (c * to.ring + (top + y) % to.ring) * to.columns;
        add_weighted(tile + y * wide, across, down[y], wide, row + left);
      }
    }
  });
}

Device::Outcome CpuDevice::settle(const Tiles& tiles) {
  const std::size_t tile = elements(shape_[1], shape_[2], shape_[3]);
  for (std::int64_t k = 0; k < tiles.count; ++k) {
    if (!finite(output_.data() + k * tile, tile)) return {k, seconds_};
  }
  return {-1, seconds_};
}

void CpuDevice::take(Range rows) {
  Band& from = band(Target::picture);
  const std::int64_t width = job_.plan.size.width, last = std::min(rows.last, job_.plan.size.height);
  const std::int64_t count = std::max<std::int64_t>(last - rows.first, 0);
  std::uint16_t* const out = finish_.room(count);
  pool_.run(ceil_div(rows.length(), 32), [&](std::int64_t part) {
    for (std::int64_t y = part * 32; y < std::min(rows.length(), part * 32 + 32); ++y) {
      for (int c = 0; c < 3; ++c) {
        float* const line = from.values.data() + (c * from.ring + (rows.first + y) % from.ring) * from.columns;
        if (y < count) quantise(line, width, out + y * width * 3 + c, 3);
        std::fill_n(line, from.columns, 0.0f);  // for the rows that come in its place
      }
    }
  });
  finish_.advance();
}

}  // namespace gdpo::detail
