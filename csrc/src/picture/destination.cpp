#include "picture/destination.hpp"

#include <cstring>

#include "picture/pixels.hpp"

namespace gdpo::detail {
namespace {

template <typename Sample, typename Void, typename Byte>
bool visit_pixels(const BasicImage<Void>& image, Byte* start, bool (*work)(Sample*)) {
  for (std::int64_t y = 0; y < image.size.height; ++y) {
    for (std::int64_t x = 0; x < image.size.width; ++x) {
      Byte* const pixel = start + y * image.row_stride + x * image.column_stride;
      Sample rgb[3];
      for (int c = 0; c < 3; ++c) std::memcpy(rgb + c, pixel + c * image.channel_stride, sizeof(Sample));
      if (!work(rgb)) return false;
      if constexpr (!std::is_const_v<Byte>) {
        for (int c = 0; c < 3; ++c) std::memcpy(pixel + c * image.channel_stride, rgb + c, sizeof(Sample));
      }
    }
  }
  return true;
}

template <typename Sample>
bool equal(Sample* rgb) {
  return rgb[0] == rgb[1] && rgb[1] == rgb[2];
}

template <typename Sample>
bool to_luma(Sample* rgb) {
  rgb[0] = rgb[1] = rgb[2] = static_cast<Sample>(luma(rgb[0], rgb[1], rgb[2]));
  return true;
}

}  // namespace

bool is_neutral(const ImageView& image) {
  const auto* const start = static_cast<const char*>(image.data);
  if (image.sample == Sample::u8) return visit_pixels<std::uint8_t>(image, start, equal);
  return visit_pixels<std::uint16_t>(image, start, equal);
}

ImageSpan Destination::rows(Range rows) {
  if (sink_ == nullptr) {
    ImageSpan band = whole_;
    band.data = static_cast<char*>(whole_.data) + rows.first * whole_.row_stride;
    band.bytes -= static_cast<std::size_t>(rows.first * whole_.row_stride);
    band.size.height = rows.length();
    return band_ = band;
  }
  const Size band{rows.length(), size.width};
  const std::size_t samples = elements(band.height, band.width, 3);
  const std::size_t needed = sample == Sample::u16 ? samples : (samples + 1) / 2;
  if (memory_.size() < needed) {
    memory_ = {};
    memory_.resize(needed);
  }
  band_ = sample == Sample::u16 ? ImageSpan::packed(memory_.data(), band)
                                : ImageSpan::packed(reinterpret_cast<std::uint8_t*>(memory_.data()), band);
  return band_;
}

void Destination::done(Range rows) {
  if (neutral_) {
    auto* const start = static_cast<char*>(band_.data);
    if (sample == Sample::u8) {
      visit_pixels<std::uint8_t>(band_, start, to_luma);
    } else {
      visit_pixels<std::uint16_t>(band_, start, to_luma);
    }
  }
  if (sink_ == nullptr) return;
  ImageView view;
  view.data = band_.data;
  view.bytes = band_.bytes;
  view.size = band_.size;
  view.sample = band_.sample;
  view.row_stride = band_.row_stride;
  view.column_stride = band_.column_stride;
  view.channel_stride = band_.channel_stride;
  (*sink_)(rows.first, view);
}

}  // namespace gdpo::detail
