/// Colour alignment in 16-bit samples: see engine/runtime/color.py, which has the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <gdpo/image.hpp>
#include <vector>

#include "common.hpp"
#include "picture/parallel.hpp"
#include "picture/pixels.hpp"

namespace gdpo::detail {

/// Exact sums of 16-bit samples, per channel.
struct Moments {
  std::uint64_t count = 0;  ///< samples of one channel
  std::array<std::uint64_t, 3> total{}, squares{};

  void add_line(int channel, const std::uint16_t* samples, std::int64_t count, std::int64_t step);
  void add(const Moments& other);
};

using Table = std::vector<std::uint16_t>;  ///< [65536]

/// What each sample of the result becomes, given the moments of the result and of the target.
std::array<Table, 3> adain_tables(const Moments& result, const Moments& target);

/// Five a-trous passes of [1 2 1]/4 along rows and columns, edges replicated, in place. [rows, columns]
void lowpass(std::vector<float>& plane, std::int64_t rows, std::int64_t columns);

/// Where the input is flat, keep its result within kFlat of it: one row of the aligned picture, in place.
class KeepFlat {
 public:
  /// @param in must outlive this @param scale of the aligned picture
  KeepFlat(const ImageView& in, std::int64_t scale);
  void operator()(std::int64_t row, std::uint16_t* samples);

 private:
  void look(std::int64_t row);

  const ImageView& in_;
  const std::int64_t scale_;
  std::int64_t row_ = -1;                    ///< of the input: what was looked at last
  bool any_ = false;                         ///< something in it is flat
  std::vector<std::uint16_t> least_, most_;  ///< [3, W] of the 3x3 samples around each
};

/// [-1,1] -> 16 bit, halves rounded up; `count` samples, written `step` apart.
void quantise(const float* line, std::int64_t count, std::uint16_t* out, std::int64_t step);

}  // namespace gdpo::detail
