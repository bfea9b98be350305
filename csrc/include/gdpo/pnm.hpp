/// Binary PPM files (P6, 8 and 16 bit): enough to try the library without an image library.
#pragma once

#include <cstdint>
#include <gdpo/error.hpp>
#include <gdpo/export.hpp>
#include <gdpo/image.hpp>
#include <string>
#include <vector>

namespace gdpo {

/// A picture that owns its samples, [height, width, 3].
struct GDPO_API Picture {
  Size size;
  Sample sample = Sample::u8;
  std::vector<std::uint8_t> bytes;  ///< samples of 16 bit in the machine's order

  Picture() = default;
  Picture(Size size, Sample sample);  ///< black. @throws InvalidArgument: no size, or more than a gigapixel

  ImageView view() const;
  ImageSpan span();
};

/// The picture in the bytes of a PPM file. @throws InvalidArgument: not one, truncated, larger than `max_pixels`
GDPO_API Picture parse_ppm(const void* data, std::size_t bytes, std::int64_t max_pixels = 100'000'000);

/// @throws InvalidArgument, or std::system_error where the file cannot be read
GDPO_API Picture read_ppm(const std::string& path, std::int64_t max_pixels = 100'000'000);

/// A whole file or nothing: written beside, flushed to the disk, its size compared, renamed. @throws std::system_error
GDPO_API void write_file(const std::string& path, const void* data, std::size_t bytes);

/// Through `write_file`. @throws std::system_error
GDPO_API void write_ppm(const std::string& path, const Picture& picture);

}  // namespace gdpo
