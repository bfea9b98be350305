/// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <string>

namespace gdpo::detail {

/// 64 lower-case hexadecimal digits. Uses the CPU's SHA instructions where it has them.
std::string sha256(const void* data, std::size_t bytes);

/// The same in plain C++, for the test that compares both.
std::string sha256_portable(const void* data, std::size_t bytes);

}  // namespace gdpo::detail
