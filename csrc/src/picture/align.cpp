#include "picture/align.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "picture/color.hpp"

namespace gdpo::detail {
namespace {

constexpr std::int64_t kRows = 32, kWaveletRows = 128;  // of a band that one thread works on

/// Takes a finished row of [W,3] samples; called from several threads, each row once.
using WriteRow = std::function<void(std::int64_t row, const std::uint16_t* samples)>;

GDPO_CLONES void line_to_16_bit(const float* __restrict line, float unit, std::int64_t count,
                                std::uint16_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_16_bit(line[i], unit);
}

/// Bands of rows, in parallel.
void bands(std::int64_t height, std::int64_t rows, Pool& pool, const std::function<void(Range)>& work) {
  pool.run(ceil_div(height, rows), [&](std::int64_t i) { work({i * rows, std::min((i + 1) * rows, height)}); });
}

void align_adain(const Buffer<std::uint16_t>& picture, const Resampler& in, float unit, Pool& pool,
                 const WriteRow& write) {
  const std::int64_t height = in.size.height, width = in.size.width;
  std::mutex mutex;
  Moments result, target;
  bands(height, kRows, pool, [&](Range rows) {
    Moments part;
    part.count = static_cast<std::uint64_t>(rows.length() * width);
    for (int c = 0; c < 3; ++c) part.add_line(c, picture.data() + rows.first * width * 3 + c, rows.length() * width, 3);
    const std::lock_guard lock(mutex);
    result.add(part);
  });
  in.window({0, height}, {0, width}, pool, [&](std::int64_t, std::int64_t count, const float* planes) {
    Moments part;
    std::vector<std::uint16_t> line(elements(width));
    part.count = static_cast<std::uint64_t>(count * width);
    for (std::int64_t row = 0; row < 3 * count; ++row) {
      line_to_16_bit(planes + row * width, unit, width, line.data());
      part.add_line(static_cast<int>(row / count), line.data(), width, 1);
    }
    const std::lock_guard lock(mutex);
    target.add(part);
  });
  const auto tables = adain_tables(result, target);
  bands(height, kRows, pool, [&](Range rows) {
    std::vector<std::uint16_t> line(elements(width, 3));
    for (std::int64_t y = rows.first; y < rows.last; ++y) {
      const std::uint16_t* const from = picture.data() + y * width * 3;
      for (std::int64_t i = 0; i < 3 * width; i += 3) {
        for (int c = 0; c < 3; ++c) line[i + c] = tables[c][from[i + c]];
      }
      write(y, line.data());
    }
  });
}

void align_wavelet(const Buffer<std::uint16_t>& picture, const Resampler& in, float unit, Pool& pool,
                   const WriteRow& write) {
  const std::int64_t height = in.size.height, width = in.size.width;
  bands(height, kWaveletRows, pool, [&](Range rows) {
    const Range halo{std::max<std::int64_t>(rows.first - kHalo, 0), std::min(rows.last + kHalo, height)};
    std::array<std::vector<float>, 3> low;
    for (auto& plane : low) plane.resize(elements(halo.length(), width));
    Pool alone(1);
    in.window(halo, {0, width}, alone, [&](std::int64_t first, std::int64_t count, const float* planes) {
      std::vector<std::uint16_t> line(elements(width));
      for (std::int64_t row = 0; row < 3 * count; ++row) {
        const std::int64_t c = row / count, y = first + row % count;
        line_to_16_bit(planes + row * width, unit, width, line.data());
        const std::uint16_t* const from = picture.data() + (halo.first + y) * width * 3 + c;
        for (std::int64_t x = 0; x < width; ++x) {
          low[c][y * width + x] = static_cast<float>(static_cast<int>(line[x]) - static_cast<int>(from[3 * x]));
        }
      }
    });
    for (auto& plane : low) lowpass(plane, halo.length(), width);
    std::vector<std::uint16_t> line(elements(width, 3));
    for (std::int64_t y = rows.first; y < rows.last; ++y) {
      for (std::int64_t i = 0; i < 3 * width; ++i) {
        const float sample = picture[y * width * 3 + i], add = low[i % 3][(y - halo.first) * width + i / 3];
        line[i] = rounded(sample + add);
      }
      write(y, line.data());
    }
  });
}

/// Rows of 16-bit samples, into the caller's memory.
WriteRow writer(const ImageSpan& out) {
  return [&out](std::int64_t row, const std::uint16_t* samples) {
    char* const start = static_cast<char*>(out.data) + row * out.row_stride;
    for (std::int64_t x = 0; x < out.size.width; ++x) {
      for (int c = 0; c < 3; ++c) {
        char* const at = start + x * out.column_stride + c * out.channel_stride;
        const std::uint16_t sample = samples[3 * x + c];
        if (out.sample == Sample::u8) {
          *at = static_cast<char>(to_8_bit(sample));
        } else {
          std::memcpy(at, &sample, sizeof sample);
        }
      }
    }
  };
}

void align(Buffer<std::uint16_t>& picture, const Resampler& in, float unit, Color color, Pool& pool,
           const WriteRow& write) {
  if (color == Color::adain) return align_adain(picture, in, unit, pool, write);
  if (color == Color::wavelet) return align_wavelet(picture, in, unit, pool, write);
  bands(in.size.height, kRows, pool, [&](Range rows) {
    for (std::int64_t y = rows.first; y < rows.last; ++y) write(y, picture.data() + y * in.size.width * 3);
  });
}

}  // namespace

void finish(Buffer<std::uint16_t>& picture, const Resampler& in, float full, Color color, Pool& pool,
            const ImageSpan& out) {
  const float unit = static_cast<float>(static_cast<double>(kFull) / static_cast<double>(full));
  const WriteRow write = writer(out);
  if (out.size == in.size) return align(picture, in, unit, color, pool, write);
  const std::int64_t width = in.size.width;
  if (color != Color::none) {
    // The wavelet reads neighbouring rows, AdaIN only the one that it replaces.
    Buffer<std::uint16_t> other(color == Color::wavelet ? picture.size() : 0);
    Buffer<std::uint16_t>& aligned = color == Color::wavelet ? other : picture;
    align(picture, in, unit, color, pool, [&](std::int64_t row, const std::uint16_t* samples) {
      std::memcpy(aligned.data() + row * width * 3, samples, sizeof(std::uint16_t) * 3 * width);
    });
    if (color == Color::wavelet) picture = std::move(other);
  }
  const Resampler last(ImageView::packed(static_cast<const std::uint16_t*>(picture.data()), in.size), out.size);
  last.window({0, out.size.height}, {0, out.size.width}, pool,
              [&](std::int64_t first, std::int64_t count, const float* planes) {
                std::vector<std::uint16_t> line(elements(out.size.width, 3));
                for (std::int64_t y = 0; y < count; ++y) {
                  for (std::int64_t i = 0; i < 3 * out.size.width; ++i) {
                    const float value = planes[(i % 3 * count + y) * out.size.width + i / 3];
                    line[i] = rounded(value);
                  }
                  write(first + y, line.data());
                }
              });
}

}  // namespace gdpo::detail
