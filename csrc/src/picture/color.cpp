#include "picture/color.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace gdpo::detail {
namespace {

GDPO_CLONES void sums(const std::uint16_t* samples, std::int64_t count, std::int64_t step, std::uint64_t* total,
                      std::uint64_t* squares) {
  std::uint64_t t = 0, s = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint64_t v = samples[i * step];
    t += v;
    s += v * v;
  }
  *total += t;
  *squares += s;
}

GDPO_CLONES void mix(const float* __restrict before, const float* __restrict here, const float* __restrict after,
                     std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = mixed(before[i], here[i], after[i]);
}

GDPO_CLONES void quantise_line(const float* __restrict line, std::int64_t count, std::int64_t step,
                               std::uint16_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i * step] = quantised(line[i]);
}

/// One channel of a row, at 16 bit.
template <typename T>
void load(const ImageView& picture, std::int64_t row, int channel, std::uint16_t* out) {
  const auto* const start =
      static_cast<const char*>(picture.data) + row * picture.row_stride + channel * picture.channel_stride;
  for (std::int64_t x = 0; x < picture.size.width; ++x) {
    T sample;
    std::memcpy(&sample, start + x * picture.column_stride, sizeof sample);
    out[x] = static_cast<std::uint16_t>(sample * (kFull / std::numeric_limits<T>::max()));
  }
}

}  // namespace

void Moments::add_line(int channel, const std::uint16_t* samples, std::int64_t count, std::int64_t step) {
  sums(samples, count, step, &total[channel], &squares[channel]);
}

void Moments::add(const Moments& other) {
  count += other.count;
  for (int c = 0; c < 3; ++c) {
    total[c] += other.total[c];
    squares[c] += other.squares[c];
  }
}

std::array<Table, 3> adain_tables(const Moments& result, const Moments& target) {
  std::array<Table, 3> tables;
  for (int c = 0; c < 3; ++c) {
    const auto from = statistics(result.count, result.total[c], result.squares[c]);
    const auto to = statistics(target.count, target.total[c], target.squares[c]);
    tables[c].resize(kFull + 1);
    for (int i = 0; i <= kFull; ++i) tables[c][i] = adain(i, from, to);
  }
  return tables;
}

void lowpass(std::vector<float>& plane, std::int64_t rows, std::int64_t columns) {
  std::vector<float> other(plane.size()), line(elements(columns + 32));
  for (const std::int64_t dilation : {1, 2, 4, 8, 16}) {
    for (std::int64_t y = 0; y < rows; ++y) {
      const std::int64_t before = std::max<std::int64_t>(y - dilation, 0), after = std::min(y + dilation, rows - 1);
      mix(plane.data() + before * columns, plane.data() + y * columns, plane.data() + after * columns, columns,
          other.data() + y * columns);
    }
    for (std::int64_t y = 0; y < rows; ++y) {
      float* const row = other.data() + y * columns;
      std::fill_n(line.begin(), dilation, row[0]);
      std::copy_n(row, columns, line.begin() + dilation);
      std::fill_n(line.begin() + dilation + columns, dilation, row[columns - 1]);
      mix(line.data(), line.data() + dilation, line.data() + 2 * dilation, columns, plane.data() + y * columns);
    }
  }
}

KeepFlat::KeepFlat(const ImageView& in, std::int64_t scale)
    : in_(in), scale_(scale), least_(elements(3, in.size.width)), most_(least_.size()) {}

void KeepFlat::look(std::int64_t row) {
  const auto [height, width] = in_.size;
  std::vector<std::uint16_t> line(elements(width)), low(line.size()), high(line.size());
  any_ = false;
  for (int c = 0; c < 3; ++c) {
    for (std::int64_t y = std::max<std::int64_t>(row - 1, 0); y <= std::min(row + 1, height - 1); ++y) {
      if (in_.sample == Sample::u8) {
        load<std::uint8_t>(in_, y, c, line.data());
      } else {
        load<std::uint16_t>(in_, y, c, line.data());
      }
      const bool first = y == std::max<std::int64_t>(row - 1, 0);
      for (std::int64_t x = 0; x < width; ++x) {
        low[x] = first ? line[x] : std::min(low[x], line[x]);
        high[x] = first ? line[x] : std::max(high[x], line[x]);
      }
    }
    for (std::int64_t x = 0; x < width; ++x) {
      const std::int64_t before = std::max<std::int64_t>(x - 1, 0), after = std::min(x + 1, width - 1);
      const std::uint16_t least = std::min({low[before], low[x], low[after]});
      const std::uint16_t most = std::max({high[before], high[x], high[after]});
      least_[c * width + x] = least, most_[c * width + x] = most;
      any_ = any_ || most - least <= kFlat;
    }
  }
  row_ = row;
}

void KeepFlat::operator()(std::int64_t row, std::uint16_t* samples) {
  if (row / scale_ != row_) look(row / scale_);
  if (!any_) return;
  const std::int64_t width = in_.size.width;
  for (int c = 0; c < 3; ++c) {
    for (std::int64_t x = 0; x < width; ++x) {
      const int least = least_[c * width + x], most = most_[c * width + x];
      if (most - least > kFlat) continue;
      for (std::int64_t i = x * scale_; i < (x + 1) * scale_; ++i) {
        samples[3 * i + c] = kept_flat(samples[3 * i + c], least, most);
      }
    }
  }
}

void quantise(const float* line, std::int64_t count, std::uint16_t* out, std::int64_t step) {
  quantise_line(line, count, step, out);
}

}  // namespace gdpo::detail
