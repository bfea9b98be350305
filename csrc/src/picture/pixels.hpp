/// The arithmetic of one sample, for the CPU and for CUDA: one definition, so that both have the same bits.
///
/// Every product and sum is rounded on its own: built with -ffp-contract=off on the CPU, with -fmad=false for CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GDPO_BOTH __host__ __device__ inline
#else
#define GDPO_BOTH inline
#endif

namespace gdpo::detail {

inline constexpr int kFull = 65535;
inline constexpr std::int64_t kHalo = 31;  ///< how many rows away the low-pass of a row reaches
inline constexpr int kFlat = 2 * 257;     ///< of 3x3 samples: the most they differ by, and the most their result is off
inline constexpr double kEpsilon = 1e-5;  ///< added to a variance of samples in [0,1], as the released code does

GDPO_BOTH float clip(float value, float least, float most) {
  value = value < least ? least : value;
  return most < value ? most : value;
}

/// Fold an index beyond a line back into it, as between two mirrors.
GDPO_BOTH std::int64_t reflect(std::int64_t index, std::int64_t size) {
  index %= 2 * size;
  if (index < 0) index += 2 * size;
  const std::int64_t mirrored = 2 * size - 1 - index;
  return mirrored < index ? mirrored : index;
}

/// A sample of the resized input -> [-1,1]. @param factor 2 / its largest value
GDPO_BOTH float normalised(float value, float factor) { return clip(value * factor - 1.0f, -1.0f, 1.0f); }

/// [-1,1] -> 16 bit, halves rounded up.
GDPO_BOTH std::uint16_t quantised(float value) {
  return static_cast<std::uint16_t>(static_cast<std::int32_t>((clip(value, -1.0f, 1.0f) + 1.0f) * 32767.5f + 0.5f));
}

/// A sample of the resized input -> 16 bit. @param unit 65535 / its largest value
GDPO_BOTH std::uint16_t to_16_bit(float value, float unit) {
  return static_cast<std::uint16_t>(static_cast<std::int32_t>(clip(value * unit + 0.5f, 0.0f, 65535.0f)));
}

/// A sum in the units of 16-bit samples -> 16 bit.
GDPO_BOTH std::uint16_t rounded(float value) {
  return static_cast<std::uint16_t>(clip(std::floor(value + 0.5f), 0.0f, 65535.0f));
}

/// An aligned sample, within kFlat of the 3x3 samples of the input around it where they are flat: see color.py.
/// @param least,most of the nine, at 16 bit
GDPO_BOTH std::uint16_t kept_flat(std::uint16_t sample, int least, int most) {
  if (most - least > kFlat) return sample;
  const int low = most - kFlat, high = least + kFlat, value = sample < low ? low : sample;
  return static_cast<std::uint16_t>(high < value ? high : value);
}

/// 16 bit -> 8 bit, rounded.
GDPO_BOTH std::uint8_t to_8_bit(std::uint32_t sample) {
  return static_cast<std::uint8_t>((sample * 255 + 32767) / 65535);
}

/// BT.601, rounded.
GDPO_BOTH std::uint32_t luma(std::uint32_t red, std::uint32_t green, std::uint32_t blue) {
  return (299 * red + 587 * green + 114 * blue + 500) / 1000;
}

/// [1 2 1]/4 of three samples.
GDPO_BOTH float mixed(float before, float here, float after) { return here * 0.5f + (before + after) * 0.25f; }

/// Not infinite and not NaN: an exponent of all ones is either.
GDPO_BOTH bool is_finite(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7F800000u) != 0x7F800000u;
}

/// Philox4x32 with ten rounds (Salmon et al., SC 2011), in place.
GDPO_BOTH void ten_rounds(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2, std::uint32_t& c3,
                          std::uint64_t seed) {
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0, p1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

struct MeanAndDeviation {
  double mean, deviation;  ///< of samples in [0,1]
};

/// From exact sums of `count` 16-bit samples and of their squares.
GDPO_BOTH MeanAndDeviation statistics(std::uint64_t count, std::uint64_t total, std::uint64_t squares) {
  const auto samples = static_cast<double>(count), full = static_cast<double>(kFull);
  const double mean = static_cast<double>(total) / samples;
  const double variance = static_cast<double>(squares) / samples - mean * mean;
  return {mean / full, std::sqrt((variance < 0.0 ? 0.0 : variance) / (full * full) + kEpsilon)};
}

/// What a 16-bit sample becomes, given the statistics of the result and of the target.
GDPO_BOTH std::uint16_t adain(int sample, const MeanAndDeviation& result, const MeanAndDeviation& target) {
  const double value = (static_cast<double>(sample) / kFull - result.mean) / result.deviation;
  double aligned = value * target.deviation + target.mean;
  aligned = aligned < 0.0 ? 0.0 : aligned;
  aligned = 1.0 < aligned ? 1.0 : aligned;
  return static_cast<std::uint16_t>(std::floor(aligned * kFull + 0.5));
}

}  // namespace gdpo::detail
