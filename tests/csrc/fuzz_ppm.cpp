/// Any bytes as a PPM file.
#include <gdpo/pnm.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto picture = gdpo::parse_ppm(data, size, 1 << 20);
    if (picture.bytes.size() > size) __builtin_trap();
  } catch (const gdpo::InvalidArgument&) {
  }
  return 0;
}
