/// Standard normal noise as a pure function of (seed, channel, row, column): see engine/runtime/noise.py, which has the
/// same bits.
#pragma once

#include <array>
#include <cstdint>

#include "common.hpp"
#include "picture/parallel.hpp"

namespace gdpo::detail {

inline constexpr const char* kGenerator = "philox4x32-10";
inline constexpr const char* kTableSha256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8";

/// 2^16 quantiles of the normal distribution, compiled in.
const float* quantile_table();

/// Philox4x32 with ten rounds (Salmon et al., SC 2011).
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t seed);

/// A window of the endless field of a seed.
/// @param rows, columns in latent pixels, within [0, 2^32)
/// @param out float [channels, rows, columns]
/// @throws InvalidArgument
void noise_field(std::uint64_t seed, int channels, Range rows, Range columns, float* out, Pool& pool);

}  // namespace gdpo::detail
