#include "picture/noise.hpp"

#include <algorithm>
#include <vector>

#include "picture/pixels.hpp"

#ifndef GDPO_TABLE_FILE
#error "GDPO_TABLE_FILE must name normal_quantiles.f32"
#endif
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the table is little-endian");

// The assembler copies the file: 2^16 float32.
__asm__(
    ".pushsection .rodata\n"
    ".balign 64\n"
    ".hidden gdpo_normal_quantiles\n"
    ".globl gdpo_normal_quantiles\n"
    "gdpo_normal_quantiles:\n"
    ".incbin \"" GDPO_TABLE_FILE
    "\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const float gdpo_normal_quantiles[1 << 16];

namespace gdpo::detail {
namespace {

constexpr int kBlock = 64;  // columns at a time

/// The words of `kBlock` columns from `x` on.
GDPO_CLONES void words_of(std::uint32_t x, std::uint32_t y, std::uint32_t group, std::uint64_t seed,
                          std::uint32_t (*words)[kBlock]) {
  for (int i = 0; i < kBlock; ++i) {
    std::uint32_t c0 = x + static_cast<std::uint32_t>(i), c1 = y, c2 = group, c3 = 0;
    ten_rounds(c0, c1, c2, c3, seed);
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

}  // namespace

const float* quantile_table() { return gdpo_normal_quantiles; }

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t seed) {
  ten_rounds(counter[0], counter[1], counter[2], counter[3], seed);
  return counter;
}

void noise_field(std::uint64_t seed, int channels, Range rows, Range columns, float* out, Pool& pool) {
  if (channels < 1) throw InvalidArgument(text("channels must be at least 1; got ", channels));
  for (const auto& [name, r] : {std::pair("rows", rows), std::pair("columns", columns)}) {
    if (r.first < 0 || r.last < r.first || r.last > std::int64_t{1} << 32) {
      throw InvalidArgument(text(name, " must be a range within [0, 2^32); got (", r.first, ", ", r.last, ")"));
    }
  }
  const std::int64_t height = rows.length(), width = columns.length();
  pool.run(height, [&](std::int64_t row) {
    const float* const table = quantile_table();
    std::uint32_t words[4][kBlock];
    for (int group = 0; group * 8 < channels; ++group) {
      const int used = std::min(channels - group * 8, 8);
      for (std::int64_t x = 0; x < width; x += kBlock) {
        words_of(static_cast<std::uint32_t>(columns.first + x), static_cast<std::uint32_t>(rows.first + row),
                 static_cast<std::uint32_t>(group), seed, words);
        const int count = static_cast<int>(std::min<std::int64_t>(width - x, kBlock));
        for (int half = 0; half < used; ++half) {
          float* const line = out + ((group * 8 + half) * height + row) * width + x;
          const std::uint32_t* const word = words[half / 2];
          const int shift = half % 2 * 16;
          for (int i = 0; i < count; ++i) line[i] = table[word[i] >> shift & 0xFFFF];
        }
      }
    }
  });
}

}  // namespace gdpo::detail
