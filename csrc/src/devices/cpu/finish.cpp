#include "devices/cpu/finish.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace gdpo::detail {
namespace {

constexpr std::int64_t kRows = 32;                         // that one thread works on
constexpr std::int64_t kLowRows = 128, kLowColumns = 512;  // of the wavelet, less the halo
constexpr std::int64_t kHandedOn = 256;                    // rows at a time

GDPO_CLONES void line_to_16_bit(const float* __restrict line, float unit, std::int64_t count,
                                std::uint16_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = to_16_bit(line[i], unit);
}

/// Bands of rows, in parallel.
void bands(Range rows, std::int64_t most, Pool& pool, const std::function<void(Range)>& work) {
  pool.run(ceil_div(rows.length(), most), [&](std::int64_t i) {
    const std::int64_t first = rows.first + i * most;
    work({first, std::min(first + most, rows.last)});
  });
}

/// A row into the caller's memory.
void store(const ImageSpan& out, std::int64_t row, const std::uint16_t* samples) {
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
}

}  // namespace

std::uint16_t* Rows::add(std::int64_t count) {
  const std::int64_t kept = range.length(), needed = kept + count;
  const auto capacity = static_cast<std::int64_t>(memory_.size()) / width_;
  if (range.last - base_ + count > capacity) {
    if (needed > capacity) {
      Buffer<std::uint16_t> larger(elements(std::max(needed, expected_), width_));
      if (kept > 0) std::memcpy(larger.data(), row(range.first), sizeof(std::uint16_t) * elements(kept, width_));
      memory_ = std::move(larger);
    } else if (kept > 0) {
      std::memmove(memory_.data(), row(range.first), sizeof(std::uint16_t) * elements(kept, width_));
    }
    base_ = range.first;
  }
  range.last += count;
  return row(range.last - count);
}

Finish::Finish(const Job& job, const Resampler& in, Pool& pool)
    : job_(job),
      in_(in),
      pool_(pool),
      unit_(static_cast<float>(static_cast<double>(kFull) / static_cast<double>(job.full()))),
      // AdaIN needs the statistics of the whole before its first row.
      restored_(in.size.width, job.request.color == Color::adain ? in.size.height : 0),
      aligned_(in.size.width, 0) {
  if (job.resized()) {
    last_ = std::make_unique<Resampler>(ImageView::packed(static_cast<const std::uint16_t*>(nullptr), in.size),
                                        job.out.size);
  }
}

void Finish::advance() {
  const std::int64_t height = in_.size.height;
  const Color color = job_.request.color;
  const bool whole = restored_.range.last == height;
  std::int64_t ready = restored_.range.last;
  if (!whole && color == Color::adain) return;
  if (!whole && color == Color::wavelet) ready = std::max(ready - kHalo, done_);
  if (color == Color::adain) measure();
  while (done_ < ready) {
    const Range rows{done_, std::min(done_ + kHandedOn, ready)};
    if (last_ == nullptr) {
      hand_on(rows, [&](const WriteRow& write) { align(rows, write); });
    } else {
      aligned_.add(rows.length());
      const std::size_t bytes = sizeof(std::uint16_t) * elements(in_.size.width, 3);
      align(rows, [&](std::int64_t y, const std::uint16_t* samples) { std::memcpy(aligned_.row(y), samples, bytes); });
      resize();
    }
    done_ = rows.last;
    restored_.drop(done_ - (color == Color::wavelet ? kHalo : 0));
  }
}

/// Rows of the result, by `work`.
void Finish::hand_on(Range rows, const std::function<void(const WriteRow&)>& work) {
  const ImageSpan out = job_.out.rows(rows);
  work([&](std::int64_t y, const std::uint16_t* samples) { store(out, y - rows.first, samples); });
  job_.out.done(rows);
}

void Finish::align(Range rows, const WriteRow& write) {
  if (job_.request.color == Color::adain) return adain(rows, write);
  if (job_.request.color == Color::wavelet) return wavelet(rows, write);
  bands(rows, kRows, pool_, [&](Range part) {
    for (std::int64_t y = part.first; y < part.last; ++y) write(y, restored_.row(y));
  });
}

/// AdaIN's tables, from the whole picture.
void Finish::measure() {
  const std::int64_t height = in_.size.height, width = in_.size.width;
  std::mutex mutex;
  Moments result, target;
  bands({0, height}, kRows, pool_, [&](Range rows) {
    Moments part;
    part.count = static_cast<std::uint64_t>(rows.length() * width);
    for (int c = 0; c < 3; ++c) part.add_line(c, restored_.row(rows.first) + c, rows.length() * width, 3);
    const std::lock_guard lock(mutex);
    result.add(part);
  });
  in_.window({0, height}, {0, width}, pool_, [&](std::int64_t, std::int64_t count, const float* planes) {
    Moments part;
    std::vector<std::uint16_t> line(elements(width));
    part.count = static_cast<std::uint64_t>(count * width);
    for (std::int64_t row = 0; row < 3 * count; ++row) {
      line_to_16_bit(planes + row * width, unit_, width, line.data());
      part.add_line(static_cast<int>(row / count), line.data(), width, 1);
    }
    const std::lock_guard lock(mutex);
    target.add(part);
  });
  tables_ = adain_tables(result, target);
}

void Finish::adain(Range rows, const WriteRow& write) {
  const std::int64_t samples = 3 * in_.size.width;
  bands(rows, kRows, pool_, [&](Range part) {
    std::vector<std::uint16_t> line(elements(samples));
    for (std::int64_t y = part.first; y < part.last; ++y) {
      const std::uint16_t* const from = restored_.row(y);
      for (std::int64_t i = 0; i < samples; i += 3) {
        for (int c = 0; c < 3; ++c) line[i + c] = tables_[c][from[i + c]];
      }
      write(y, line.data());
    }
  });
}

void Finish::wavelet(Range rows, const WriteRow& write) {
  const std::int64_t height = in_.size.height, width = in_.size.width;
  const std::int64_t strips = ceil_div(width, kLowColumns);
  Buffer<std::uint16_t> band(elements(rows.length(), width, 3));
  pool_.run(ceil_div(rows.length(), kLowRows) * strips, [&](std::int64_t i) {
    const std::int64_t top = rows.first + i / strips * kLowRows, left = i % strips * kLowColumns;
    const Range inner{top, std::min(top + kLowRows, rows.last)}, columns{left, std::min(left + kLowColumns, width)};
    const Range tall{std::max<std::int64_t>(inner.first - kHalo, 0), std::min(inner.last + kHalo, height)};
    const Range wide{std::max<std::int64_t>(columns.first - kHalo, 0), std::min(columns.last + kHalo, width)};
    const std::int64_t stride = wide.length();
    std::array<std::vector<float>, 3> low;
    for (auto& plane : low) plane.resize(elements(tall.length(), stride));
    Pool alone(1);
    in_.window(tall, wide, alone, [&](std::int64_t first, std::int64_t count, const float* planes) {
      std::vector<std::uint16_t> line(elements(stride));
      for (std::int64_t row = 0; row < 3 * count; ++row) {
        const std::int64_t c = row / count, y = first + row % count;
        line_to_16_bit(planes + row * stride, unit_, stride, line.data());
        const std::uint16_t* const from = restored_.row(tall.first + y) + 3 * wide.first + c;
        for (std::int64_t x = 0; x < stride; ++x) {
          low[c][y * stride + x] = static_cast<float>(static_cast<int>(line[x]) - static_cast<int>(from[3 * x]));
        }
      }
    });
    for (auto& plane : low) lowpass(plane, tall.length(), stride);
    for (std::int64_t y = inner.first; y < inner.last; ++y) {
      const std::uint16_t* const from = restored_.row(y);
      std::uint16_t* const to = band.data() + (y - rows.first) * 3 * width;
      for (std::int64_t x = columns.first; x < columns.last; ++x) {
        for (int c = 0; c < 3; ++c) {
          const float sample = from[3 * x + c], add = low[c][(y - tall.first) * stride + x - wide.first];
          to[3 * x + c] = rounded(sample + add);
        }
      }
    }
  });
  bands(rows, kRows, pool_, [&](Range part) {
    KeepFlat keep_flat(job_.in, width / job_.in.size.width);
    for (std::int64_t y = part.first; y < part.last; ++y) {
      std::uint16_t* const row = band.data() + (y - rows.first) * 3 * width;
      keep_flat(y, row);
      write(y, row);
    }
  });
}

/// What can be made of the aligned rows at another size.
void Finish::resize() {
  const Size size = job_.out.size;
  const std::int64_t width = size.width;
  last_->source(aligned_.row(aligned_.range.first), aligned_.range.first);
  std::int64_t ready = written_;
  while (ready < size.height && last_->needed(ready).last <= aligned_.range.last) ++ready;
  while (written_ < ready) {
    const Range rows{written_, std::min(written_ + kHandedOn, ready)};
    hand_on(rows, [&](const WriteRow& write) {
      last_->window(rows, {0, width}, pool_, [&](std::int64_t first, std::int64_t count, const float* planes) {
        std::vector<std::uint16_t> line(elements(width, 3));
        for (std::int64_t y = 0; y < count; ++y) {
          for (std::int64_t i = 0; i < 3 * width; ++i) line[i] = rounded(planes[(i % 3 * count + y) * width + i / 3]);
          write(rows.first + first + y, line.data());
        }
      });
    });
    written_ = rows.last;
  }
  if (written_ < size.height) aligned_.drop(last_->needed(written_).first);
}

}  // namespace gdpo::detail
