/// Separable bicubic, a = -0.5, antialiased when it shrinks: see engine/runtime/resample.py, which has the same bits.
#pragma once

#include <algorithm>
#include <functional>
#include <gdpo/image.hpp>
#include <vector>

#include "common.hpp"
#include "picture/parallel.hpp"

namespace gdpo::detail {

inline constexpr const char* kResampler = "bicubic a=-0.5 antialias";

/// The filter that takes a line of `size` samples to `new_size`: output i is the sum over k of
/// weights[i * count + k] * sample[first[i] + k]; taps beyond the line's end have weight 0.
struct Taps {
  Taps(std::int64_t size, std::int64_t new_size);
  std::vector<std::int64_t> first;
  std::vector<float> weights;
  std::int64_t count = 0;
};

/// A picture on its way to another size, a window at a time.
class Resampler {
 public:
  /// @param picture must outlive this
  Resampler(const ImageView& picture, Size size);

  /// A band of a window: `count` rows from `first` on (of the window), planes [3, count, columns] in the units of the
  /// samples, not clipped.
  using Sink = std::function<void(std::int64_t first, std::int64_t count, float* planes)>;

  /// Resize a window, which may reach beyond the picture: there it continues mirrored. `sink` gets its bands, in any
  /// order, from several threads.
  void window(Range rows, Range columns, Pool& pool, const Sink& sink) const;

  /// Rows of the picture from `first` on, packed, where it is not in memory whole.
  void source(const void* rows, std::int64_t first) {
    picture_.data = rows;
    first_row_ = first;
  }

  /// The rows of the picture that a row of the result needs.
  Range needed(std::int64_t row) const {
    return {down_.first[row], std::min(down_.first[row] + down_.count, picture_.size.height)};
  }

  const Size size;

 private:
  struct Columns;
  void band(Range rows, const Columns& columns, float* planes) const;

  ImageView picture_;
  std::int64_t first_row_ = 0;  // what lies at picture_.data
  Taps down_, across_;
};

}  // namespace gdpo::detail
