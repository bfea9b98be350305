#include "api/views.hpp"

#include <algorithm>
#include <array>
#include <cstdint>

#include "common.hpp"

namespace gdpo::detail {
namespace {

constexpr std::int64_t kMaxSide = 1'000'000'000;

struct Dimension {
  const char* name;
  std::int64_t count, stride;
};

template <typename Void>
std::array<Dimension, 3> axes(const BasicImage<Void>& image) {
  return {{{"row_stride", image.size.height, image.row_stride},
           {"column_stride", image.size.width, image.column_stride},
           {"channel_stride", image.channels, image.channel_stride}}};
}

/// Bytes from the first sample to the end of the last.
template <typename Void>
std::uint64_t reach(const char* name, const BasicImage<Void>& image) {
  if (image.data == nullptr) throw InvalidArgument(text(name, ": data is null"));
  if (image.size.height < 1 || image.size.width < 1) {
    throw InvalidArgument(text(name, ": size must be at least 1x1; got ", image.size.height, "x", image.size.width));
  }
  if (image.size.height > kMaxSide || image.size.width > kMaxSide) {  // a stride of 0 makes any size fit its buffer
    throw InvalidArgument(
        text(name, ": sides must be at most ", kMaxSide, "; got ", image.size.height, "x", image.size.width));
  }
  if (image.channels != 3) throw InvalidArgument(text(name, ": channels must be 3 (RGB); got ", image.channels));
  if (image.sample != Sample::u8 && image.sample != Sample::u16) {
    throw InvalidArgument(text(name, ": sample must be u8 or u16; got ", static_cast<int>(image.sample)));
  }
  auto end = static_cast<std::uint64_t>(image.sample_bytes());
  for (const auto& axis : axes(image)) {
    if (axis.stride < 0) throw InvalidArgument(text(name, ": ", axis.name, " must not be negative; got ", axis.stride));
    std::uint64_t length = 0;
    if (__builtin_mul_overflow(static_cast<std::uint64_t>(axis.count - 1), static_cast<std::uint64_t>(axis.stride),
                               &length) ||
        __builtin_add_overflow(end, length, &end)) {
      throw InvalidArgument(text(name, ": ", axis.name, " ", axis.stride, " reaches beyond all memory"));
    }
  }
  if (end > image.bytes) {
    throw InvalidArgument(text(name, ": its strides reach ", end, " bytes, the buffer has ", image.bytes));
  }
  return end;
}

}  // namespace

void check_input(const ImageView& image) { reach("in", image); }

void check_output(const ImageSpan& image, const ImageView& input, Size size) {
  const std::uint64_t end = reach("out", image);
  if (image.size != size) {
    throw InvalidArgument(
        text("out: size must be ", size.height, "x", size.width, "; got ", image.size.height, "x", image.size.width));
  }
  if (image.sample != input.sample) throw InvalidArgument("out: samples must be as many bits as those of in");
  auto order = axes(image);
  std::sort(order.begin(), order.end(), [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  std::int64_t inner = image.sample_bytes();  // bytes that one step of the next axis must pass over
  for (const auto& axis : order) {
    if (axis.count == 1) continue;
    if (axis.stride < inner) {
      throw InvalidArgument(
          text("out: ", axis.name, " ", axis.stride, " makes samples share memory; at least ", inner));
    }
    inner += (axis.count - 1) * axis.stride;
  }
  const auto first = reinterpret_cast<std::uintptr_t>(image.data),
             source = reinterpret_cast<std::uintptr_t>(input.data);
  if (first < source + reach("in", input) && source < first + end) throw InvalidArgument("out overlaps in");
}

}  // namespace gdpo::detail
