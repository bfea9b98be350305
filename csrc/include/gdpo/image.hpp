/// Pictures in memory that the caller owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace gdpo {

/// Pixels of the largest result, unless a request asks for more.
inline constexpr std::int64_t kMaxPixels = 1'000'000'000;

/// What a sample is.
enum class Sample { u8, u16 };

struct Size {
  std::int64_t height = 0, width = 0;
  bool operator==(const Size& other) const { return height == other.height && width == other.width; }
  bool operator!=(const Size& other) const { return !(*this == other); }
};

/// A picture of [height, width, channels] samples somewhere in `bytes` bytes at `data`. Strides are in bytes and not
/// negative; planes (channel_stride = a plane) and the colours of RGBA (column_stride = 4 samples) are views too.
template <typename Void>
struct BasicImage {
  Void* data = nullptr;
  std::size_t bytes = 0;  ///< from `data` on, what may be touched
  Size size;
  int channels = 3;  ///< 3 is what is accepted
  Sample sample = Sample::u8;
  std::int64_t row_stride = 0, column_stride = 0, channel_stride = 0;

  BasicImage() = default;

  /// Packed samples [height, width, 3].
  template <typename T>
  static BasicImage packed(T* data, Size size) {
    using Plain = std::remove_const_t<T>;
    static_assert(std::is_same_v<Plain, std::uint8_t> || std::is_same_v<Plain, std::uint16_t>,
                  "samples are 8 or 16 bit");
    constexpr std::uint64_t item = sizeof(T);
    const std::uint64_t row = static_cast<std::uint64_t>(size.width) * 3 * item;  // absurd sizes are refused when used
    BasicImage image;
    image.data = data;
    image.size = size;
    image.sample = sizeof(T) == 1 ? Sample::u8 : Sample::u16;
    image.row_stride = static_cast<std::int64_t>(row);
    image.column_stride = 3 * item;
    image.channel_stride = item;
    image.bytes = static_cast<std::size_t>(static_cast<std::uint64_t>(size.height) * row);
    return image;
  }

  std::int64_t sample_bytes() const { return sample == Sample::u8 ? 1 : 2; }
};

using ImageView = BasicImage<const void>;  ///< read
using ImageSpan = BasicImage<void>;        ///< written

}  // namespace gdpo
