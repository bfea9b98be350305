/// What one thread of each CUDA kernel does: see kernels.cu. Nothing here needs CUDA, and tests/csrc runs the same
/// functions on the CPU over all threads.
///
/// A kernel is a struct of numbers and device pointers with an extent and `operator()(plane, row, column)`, which
/// computes what lies there. No two threads write the same memory, save for flags, where all write the same value, and
/// for the sums of Sums, which are integers: the bits do not depend on the order.
#pragma once

#include "picture/pixels.hpp"

namespace gdpo::detail {

struct Extent {
  std::int64_t planes, rows, columns;
};

/// A thread's column, its first row and plane, and the steps to the next ones.
struct Thread {
  std::int64_t column, row, plane, rows, planes;
};

template <typename Kernel>
GDPO_BOTH void each(const Kernel& kernel, const Thread& thread) {
  if (thread.column >= kernel.extent.columns) return;
  for (std::int64_t z = thread.plane; z < kernel.extent.planes; z += thread.planes) {
    for (std::int64_t y = thread.row; y < kernel.extent.rows; y += thread.rows) kernel(z, y, thread.column);
  }
}

/// Taps (see resample.hpp) on the device.
struct Filter {
  const std::int32_t* first;
  const float* weights;
  std::int64_t count;
};

/// A picture [height, width, 3] of packed samples on its way to another size.
struct Resize {
  const void* samples;
  bool wide;  ///< 16 bit
  std::int64_t height, width, new_height, new_width;
  Filter down, across;

  /// A pixel of the result: along the row first, then down; taps from the first to the last.
  GDPO_BOTH void pixel(std::int64_t y, std::int64_t x, float* rgb) const {
    if (wide) {
      filtered(static_cast<const std::uint16_t*>(samples), y, x, rgb);
    } else {
      filtered(static_cast<const std::uint8_t*>(samples), y, x, rgb);
    }
  }

  /// The least and the most of the 3x3 samples around one, at 16 bit; beyond the border there are none.
  GDPO_BOTH void around(std::int64_t y, std::int64_t x, int channel, int* least, int* most) const {
    *least = kFull, *most = 0;
    for (std::int64_t row = y > 0 ? y - 1 : 0; row <= y + 1 && row < height; ++row) {
      for (std::int64_t column = x > 0 ? x - 1 : 0; column <= x + 1 && column < width; ++column) {
        const std::int64_t i = (row * width + column) * 3 + channel;
        const int sample = wide ? static_cast<int>(static_cast<const std::uint16_t*>(samples)[i])
                                : static_cast<const std::uint8_t*>(samples)[i] * 257;
        *least = sample < *least ? sample : *least;
        *most = *most < sample ? sample : *most;
      }
    }
  }

 private:
  template <typename T>
  GDPO_BOTH void filtered(const T* picture, std::int64_t y, std::int64_t x, float* rgb) const {
    for (std::int64_t k = 0; k < down.count; ++k) {
      const std::int64_t row = down.first[y] + k < height ? down.first[y] + k : height - 1;  // beyond: weight 0
      float sum[3];
      for (std::int64_t j = 0; j < across.count; ++j) {
        const std::int64_t column = across.first[x] + j < width ? across.first[x] + j : width - 1;
        const float weight = across.weights[x * across.count + j];
        for (int c = 0; c < 3; ++c) {
          const float term = static_cast<float>(picture[(row * width + column) * 3 + c]) * weight;
          sum[c] = j == 0 ? term : sum[c] + term;
        }
      }
      const float weight = down.weights[y * down.count + k];
      for (int c = 0; c < 3; ++c) rgb[c] = k == 0 ? sum[c] * weight : rgb[c] + sum[c] * weight;
    }
  }
};

/// Tiles in one row, side by side; lengths in latent pixels.
struct Row {
  std::int64_t top;
  const std::int64_t* lefts;
};

/// Samples in the caller's depth.
struct Output {
  void* samples;
  bool wide;
  GDPO_BOTH void store(std::int64_t i, std::uint16_t sample) const {
    if (wide) {
      static_cast<std::uint16_t*>(samples)[i] = sample;
    } else {
      static_cast<std::uint8_t*>(samples)[i] = to_8_bit(sample);
    }
  }
};

/// Tiles of the resized input in [-1,1], [places, 3, rows, columns]; beyond the picture it continues mirrored.
struct Images {
  Extent extent;  // places, rows, columns
  Resize in;
  float factor;
  std::int64_t resolution;
  Row tiles;
  float* out;

  GDPO_BOTH void operator()(std::int64_t place, std::int64_t y, std::int64_t x) const {
    float rgb[3];
    in.pixel(reflect(tiles.top * resolution + y, in.new_height),
             reflect(tiles.lefts[place] * resolution + x, in.new_width), rgb);
    for (int c = 0; c < 3; ++c) {
      out[((place * 3 + c) * extent.rows + y) * extent.columns + x] = normalised(rgb[c], factor);
    }
  }
};

/// Tiles of the noise field, [places, channels, rows, columns]. One thread has the eight channels of a counter.
struct Noises {
  Extent extent;  // places * ceil(channels / 8), rows, columns
  std::uint64_t seed;
  const float* quantiles;
  std::int64_t channels;
  Row tiles;
  float* out;

  GDPO_BOTH void operator()(std::int64_t z, std::int64_t y, std::int64_t x) const {
    const std::int64_t groups = (channels + 7) / 8, place = z / groups, group = z % groups;
    std::uint32_t words[4] = {static_cast<std::uint32_t>(tiles.lefts[place] + x),
                              static_cast<std::uint32_t>(tiles.top + y), static_cast<std::uint32_t>(group), 0};
    ten_rounds(words[0], words[1], words[2], words[3], seed);
    for (int half = 0; half < 8 && group * 8 + half < channels; ++half) {
      const std::int64_t plane = place * channels + group * 8 + half;
      out[(plane * extent.rows + y) * extent.columns + x] = quantiles[words[half / 2] >> half % 2 * 16 & 0xFFFF];
    }
  }
};

/// Tiles cut from a field [channels, rows, columns].
struct Cut {
  Extent extent;  // places * channels, rows, columns
  const float* field;
  std::int64_t channels, field_rows, field_columns;
  Row tiles;
  float* out;

  GDPO_BOTH void operator()(std::int64_t z, std::int64_t y, std::int64_t x) const {
    const std::int64_t row = z % channels * field_rows + tiles.top + y;
    out[(z * extent.rows + y) * extent.columns + x] = field[row * field_columns + tiles.lefts[z / channels] + x];
  }
};

/// Tiles [places, channels, rows, wide], added to a band with their weights, in order. The band is a ring of `ring`
/// rows: row r of the whole lies at r % ring.
struct Blend {
  Extent extent;  // channels, rows of a tile, columns from the first tile's start to the last one's end
  const float* tiles;
  std::int64_t places, wide, resolution;
  Row row;
  const float *across, *down;  // shares: [places, wide] and [rows]
  float* band;                 // [channels, ring, stride]
  std::int64_t ring, stride;
  std::int32_t* not_finite;  // [places], set to 1

  GDPO_BOTH void operator()(std::int64_t c, std::int64_t y, std::int64_t x) const {
    const std::int64_t column = row.lefts[0] * resolution + x;
    float* const sum = band + (c * ring + (row.top * resolution + y) % ring) * stride + column;
    float value = *sum;
    for (std::int64_t k = 0; k < places; ++k) {
      const std::int64_t i = column - row.lefts[k] * resolution;
      if (i < 0 || i >= wide) continue;
      const float sample = tiles[((k * extent.planes + c) * extent.rows + y) * wide + i];
      if (!is_finite(sample)) not_finite[k] = 1;
      value += sample * across[k * wide + i] * down[y];
    }
    *sum = value;
  }
};

/// Finished rows of the band, quantised into the picture [height, width, 3]; the band is emptied for the next ones.
struct Take {
  Extent extent;  // 1, rows, stride
  float* band;
  std::int64_t first, ring, height, width;
  std::uint16_t* picture;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t y, std::int64_t x) const {
    for (int c = 0; c < 3; ++c) {
      float* const value = band + (c * ring + (first + y) % ring) * extent.columns + x;
      if (first + y < height && x < width) picture[((first + y) * width + x) * 3 + c] = quantised(*value);
      *value = 0;
    }
  }
};

/// Exact sums of 16-bit samples and of their squares.
struct Sums {
  Extent extent;  // 1, height, width
  const std::uint16_t* picture;
  Resize in;
  float unit;
  std::uint64_t* sums;  // [12]: the picture's totals and squares, then the input's

  GDPO_BOTH void operator()(std::int64_t y, std::int64_t x, std::uint64_t* own) const {
    float rgb[3];
    in.pixel(y, x, rgb);
    for (int c = 0; c < 3; ++c) {
      const std::uint64_t result = picture[(y * extent.columns + x) * 3 + c], target = to_16_bit(rgb[c], unit);
      own[c] += result;
      own[3 + c] += result * result;
      own[6 + c] += target;
      own[9 + c] += target * target;
    }
  }
};

/// One thread's part of the sums, `own` zeros before.
GDPO_BOTH void gather(const Sums& kernel, const Thread& thread, std::uint64_t* own) {
  if (thread.column >= kernel.extent.columns) return;
  for (std::int64_t y = thread.row; y < kernel.extent.rows; y += thread.rows) kernel(y, thread.column, own);
}

/// What AdaIN makes of each 16-bit sample.
struct AdainTables {
  Extent extent;              // 1, 3, 65536
  const std::uint64_t* sums;  // of Sums
  std::uint64_t count;
  std::uint16_t* tables;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t c, std::int64_t sample) const {
    tables[c * (kFull + 1) + sample] = adain(static_cast<int>(sample), statistics(count, sums[c], sums[3 + c]),
                                             statistics(count, sums[6 + c], sums[9 + c]));
  }
};

/// The picture, through AdaIN's tables where there are some.
struct Write {
  Extent extent;  // 1, height, width
  const std::uint16_t *picture, *tables;
  Output out;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t y, std::int64_t x) const {
    for (int c = 0; c < 3; ++c) {
      const std::int64_t i = (y * extent.columns + x) * 3 + c;
      out.store(i, tables != nullptr ? tables[c * (kFull + 1) + picture[i]] : picture[i]);
    }
  }
};

/// Input less picture, [3, rows, width], for the wavelet's low-pass.
struct Difference {
  Extent extent;  // 1, rows, width
  std::int64_t first;
  const std::uint16_t* picture;
  Resize in;
  float unit;
  float* out;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t y, std::int64_t x) const {
    float rgb[3];
    in.pixel(first + y, x, rgb);
    for (int c = 0; c < 3; ++c) {
      const int result = picture[((first + y) * extent.columns + x) * 3 + c];
      out[(c * extent.rows + y) * extent.columns + x] =
          static_cast<float>(static_cast<int>(to_16_bit(rgb[c], unit)) - result);
    }
  }
};

/// One pass of the low-pass, down or across; edges replicated.
struct LowPass {
  Extent extent;  // 3, rows, width
  const float* from;
  float* to;
  std::int64_t down, across;  // the dilation, and 0

  GDPO_BOTH void operator()(std::int64_t c, std::int64_t y, std::int64_t x) const {
    to[at(c, y, x)] = mixed(from[at(c, y - down, x - across)], from[at(c, y, x)], from[at(c, y + down, x + across)]);
  }

 private:
  GDPO_BOTH static std::int64_t inside(std::int64_t i, std::int64_t size) {
    return i < 0 ? 0 : (i < size ? i : size - 1);
  }
  GDPO_BOTH std::int64_t at(std::int64_t c, std::int64_t y, std::int64_t x) const {
    return (c * extent.rows + inside(y, extent.rows)) * extent.columns + inside(x, extent.columns);
  }
};

/// The picture plus the low-passed difference; what is flat in the input stays flat.
struct AddLow {
  Extent extent;  // 1, rows, width
  std::int64_t first, low_first, low_rows;
  Resize in;
  const float* low;  // [3, low_rows, width], from row low_first on
  const std::uint16_t* picture;
  Output out;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t y, std::int64_t x) const {
    for (int c = 0; c < 3; ++c) {
      const std::int64_t i = ((first + y) * extent.columns + x) * 3 + c;
      const float add = low[(c * low_rows + first + y - low_first) * extent.columns + x];
      int least, most;
      in.around((first + y) * in.height / in.new_height, x * in.width / in.new_width, c, &least, &most);
      out.store(i, kept_flat(rounded(static_cast<float>(picture[i]) + add), least, most));
    }
  }
};

/// The aligned picture at another size than the model's.
struct Resized {
  Extent extent;  // 1, height, width
  Resize from;
  Output out;

  GDPO_BOTH void operator()(std::int64_t, std::int64_t y, std::int64_t x) const {
    float rgb[3];
    from.pixel(y, x, rgb);
    for (int c = 0; c < 3; ++c) out.store((y * extent.columns + x) * 3 + c, rounded(rgb[c]));
  }
};

// X(struct, name of the kernel); Sums is apart, it adds up over threads.
#define GDPO_KERNELS(X)             \
  X(Images, gdpo_images)            \
  X(Noises, gdpo_noises)            \
  X(Cut, gdpo_cut)                  \
  X(Blend, gdpo_blend)              \
  X(Take, gdpo_take)                \
  X(AdainTables, gdpo_adain_tables) \
  X(Write, gdpo_write)              \
  X(Difference, gdpo_difference)    \
  X(LowPass, gdpo_low_pass)         \
  X(AddLow, gdpo_add_low)           \
  X(Resized, gdpo_resized)

#define GDPO_NAME(Kernel, name) \
  constexpr const char* kernel_name(const Kernel&) { return #name; }
GDPO_KERNELS(GDPO_NAME)
GDPO_NAME(Sums, gdpo_sums)
#undef GDPO_NAME

inline constexpr int kThreads = 128;  ///< of a block, along a row

}  // namespace gdpo::detail
