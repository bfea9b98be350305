/// The last part of a picture's way on the CPU: colours, other factors than x4, the caller's samples. Restored rows
/// come from the top to the bottom, and leave as soon as all that they depend on is there.
#pragma once

#include "picture/color.hpp"
#include "picture/device.hpp"
#include "picture/resample.hpp"

namespace gdpo::detail {

/// Rows [first, last) of a picture of 16-bit samples, [rows, W, 3]; they are added below and dropped above.
class Rows {
 public:
  explicit Rows(std::int64_t width, std::int64_t expected) : width_(3 * width), expected_(expected) {}

  Range range{0, 0};
  const std::uint16_t* row(std::int64_t y) const { return memory_.data() + (y - base_) * width_; }
  std::uint16_t* row(std::int64_t y) { return memory_.data() + (y - base_) * width_; }

  /// Room for the next `count` rows; moves the others.
  std::uint16_t* add(std::int64_t count);
  void drop(std::int64_t before) { range.first = std::max(range.first, std::min(before, range.last)); }

 private:
  std::int64_t width_, expected_, base_ = 0;  // the row at the start of the memory
  Buffer<std::uint16_t> memory_;
};

class Finish {
 public:
  /// @param in the input on its way to the size of the restored picture
  Finish(const Job& job, const Resampler& in, Pool& pool);

  /// Where the next restored rows belong.
  std::uint16_t* room(std::int64_t count) { return restored_.add(count); }

  /// They are there: hand on what can be.
  void advance();

 private:
  /// Takes a finished row of [W,3] samples; called from several threads, each row once.
  using WriteRow = std::function<void(std::int64_t row, const std::uint16_t* samples)>;

  void align(Range rows, const WriteRow& write);
  void adain(Range rows, const WriteRow& write);
  void wavelet(Range rows, const WriteRow& write);
  void measure();
  void resize();
  void hand_on(Range rows, const std::function<void(const WriteRow&)>& work);

  const Job& job_;
  const Resampler& in_;
  Pool& pool_;
  const float unit_;
  Rows restored_, aligned_;
  std::int64_t done_ = 0;  ///< rows that are aligned
  std::array<Table, 3> tables_;
  std::unique_ptr<Resampler> last_;  ///< to another size than the model's
  std::int64_t written_ = 0;
};

}  // namespace gdpo::detail
