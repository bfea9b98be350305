/// Colour alignment in 16-bit samples: see engine/runtime/color.py, which has the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
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

/// [-1,1] -> 16 bit, halves rounded up; `count` samples, written `step` apart.
void quantise(const float* line, std::int64_t count, std::uint16_t* out, std::int64_t step);

}  // namespace gdpo::detail
