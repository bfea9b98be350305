#include "picture/resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "picture/pixels.hpp"

namespace gdpo::detail {
namespace {

constexpr std::int64_t kBand = 32;  // rows at a time: what they need stays in the second-level cache

/// One line filtered: every product and sum is rounded, taps from the first to the last.
/// @param weights [taps, count]
GDPO_CLONES void filter_line(const float* __restrict line, const std::int32_t* __restrict first,
                             const float* __restrict weights, std::int64_t taps, std::int64_t count,
                             float* __restrict out) {
  if (taps == 4) {  // enlarging
    const float *w0 = weights, *w1 = w0 + count, *w2 = w1 + count, *w3 = w2 + count;
    for (std::int64_t i = 0; i < count; ++i) {
      const float* const sample = line + first[i];
      out[i] = ((sample[0] * w0[i] + sample[1] * w1[i]) + sample[2] * w2[i]) + sample[3] * w3[i];
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) out[i] = line[first[i]] * weights[i];
  for (std::int64_t k = 1; k < taps; ++k) {
    const float* const weight = weights + k * count;
    for (std::int64_t i = 0; i < count; ++i) out[i] += line[first[i] + k] * weight[i];
  }
}

GDPO_CLONES void scale_line(const float* __restrict line, float weight, std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = line[i] * weight;
}

GDPO_CLONES void add_line(const float* __restrict line, float weight, std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] += line[i] * weight;
}

template <typename T>
void load(const ImageView& picture, std::int64_t row, Range columns, int channel, float* out) {
  const auto* const start = static_cast<const char*>(picture.data) + row * picture.row_stride +
                            columns.first * picture.column_stride + channel * picture.channel_stride;
  const std::int64_t count = columns.length();
  for (std::int64_t i = 0; i < count; ++i) {
    T sample;
    std::memcpy(&sample, start + i * picture.column_stride, sizeof sample);
    out[i] = sample;
  }
}

}  // namespace

Taps::Taps(std::int64_t size, std::int64_t new_size) {
  if (size < 1 || new_size < 1) throw InvalidArgument(text("sizes must be at least 1; got ", size, " -> ", new_size));
  const double scale = static_cast<double>(size) / static_cast<double>(new_size), stretch = std::max(scale, 1.0);
  std::vector<std::int64_t> last(elements(new_size));
  first.resize(last.size());
  for (std::size_t i = 0; i < last.size(); ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    first[i] = std::max<std::int64_t>(static_cast<std::int64_t>(std::floor(center - 2 * stretch + 0.5)), 0);
    last[i] = std::min<std::int64_t>(static_cast<std::int64_t>(std::floor(center + 2 * stretch + 0.5)), size);
    count = std::max(count, last[i] - first[i]);
  }
  weights.resize(elements(new_size, count));
  std::vector<double> exact(elements(count));
  constexpr double a = -0.5;
  for (std::size_t i = 0; i < last.size(); ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    double sum = 0;
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t position = first[i] + k;
      const double t = std::abs((static_cast<double>(position) - center + 0.5) / stretch);
      double weight = 0;
      if (t < 1) {
        weight = ((a + 2) * t - (a + 3)) * t * t + 1;
      } else if (t < 2) {
        weight = (((t - 5) * t + 8) * t - 4) * a;
      }
      exact[k] = position < last[i] ? weight : 0;
      sum += exact[k];
    }
    for (std::int64_t k = 0; k < count; ++k) weights[i * count + k] = static_cast<float>(exact[k] / sum);
  }
}

/// What the columns of a window need of a line.
struct Resampler::Columns {
  Columns(const Taps& taps, Range window, std::int64_t size, std::int64_t samples)
      : count(window.length()), first(elements(count)), weights(elements(taps.count, count)) {
    std::vector<std::int64_t> at(first.size());
    needed = {samples, 0};
    for (std::int64_t i = 0; i < count; ++i) {
      at[i] = reflect(window.first + i, size);
      needed.first = std::min(needed.first, taps.first[at[i]]);
      needed.last = std::max(needed.last, taps.first[at[i]]);
    }
    needed.last = std::min(needed.last + taps.count, samples);
    for (std::int64_t i = 0; i < count; ++i) {
      first[i] = static_cast<std::int32_t>(taps.first[at[i]] - needed.first);
      for (std::int64_t k = 0; k < taps.count; ++k) weights[k * count + i] = taps.weights[at[i] * taps.count + k];
    }
  }

  std::int64_t count;
  Range needed;                     // samples of the line
  std::vector<std::int32_t> first;  // [count], from needed.first
  std::vector<float> weights;       // [taps, count]
};

Resampler::Resampler(const ImageView& picture, Size size)
    : size(size), picture_(picture), down_(picture.size.height, size.height), across_(picture.size.width, size.width) {}

void Resampler::window(Range rows, Range columns, Pool& pool, const Sink& sink) const {
  if (rows.length() < 1 || columns.length() < 1) return;
  const Columns across(across_, columns, size.width, picture_.size.width);
  pool.run(ceil_div(rows.length(), kBand), [&](std::int64_t i) {
    const std::int64_t first = i * kBand, count = std::min(rows.length() - first, kBand);
    Buffer<float> planes(elements(3, count, across.count));
    band({rows.first + first, rows.first + first + count}, across, planes.data());
    sink(first, count, planes.data());
  });
}

void Resampler::band(Range rows, const Columns& columns, float* planes) const {
  const std::int64_t count = rows.length(), width = columns.count;
  std::vector<std::int64_t> at(elements(count));
  Range needed{picture_.size.height, 0};
  for (std::int64_t i = 0; i < count; ++i) {
    at[i] = reflect(rows.first + i, size.height);
    needed.first = std::min(needed.first, down_.first[at[i]]);
    needed.last = std::max(needed.last, down_.first[at[i]]);
  }
  needed.last = std::min(needed.last + down_.count, picture_.size.height);
  const std::int64_t source = needed.length();
  // A tap past the end has weight 0: behind the line's last sample there are zeros for it to read.
  std::vector<float> line(elements(columns.needed.length() + across_.count));
  Buffer<float> filtered(elements(source, width));
  for (int channel = 0; channel < 3; ++channel) {
    for (std::int64_t row = 0; row < source; ++row) {
      if (picture_.sample == Sample::u8) {
        load<std::uint8_t>(picture_, needed.first - first_row_ + row, columns.needed, channel, line.data());
      } else {
        load<std::uint16_t>(picture_, needed.first - first_row_ + row, columns.needed, channel, line.data());
      }
      filter_line(line.data(), columns.first.data(), columns.weights.data(), across_.count, width,
                  filtered.data() + row * width);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      float* const out = planes + (channel * count + i) * width;
      for (std::int64_t k = 0; k < down_.count; ++k) {
        const std::int64_t row = std::min(down_.first[at[i]] - needed.first + k, source - 1);
        const float weight = down_.weights[at[i] * down_.count + k];
        (k == 0 ? scale_line : add_line)(filtered.data() + row * width, weight, width, out);
      }
    }
  }
}

}  // namespace gdpo::detail
