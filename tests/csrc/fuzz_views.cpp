/// Any sizes and strides: refused, or every sample can be read and written.
#include <algorithm>
#include <cstring>
#include <vector>

#include "api/views.hpp"
#include "picture/resample.hpp"

namespace {

/// Numbers from the input: mostly small, so that many views are valid.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::int64_t next() {
    if (at_ >= size_) return 1;
    const std::uint8_t kind = data_[at_++];
    if (kind < 240) return kind % 24;
    std::int64_t value = 0;
    const std::size_t count = std::min(sizeof value, size_ - at_);
    std::memcpy(&value, data_ + at_, count);
    at_ += count;
    return value;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

template <typename Image, typename Data>
Image image(Source& source, std::vector<Data>& memory) {
  Image result;
  result.size = {source.next(), source.next()};
  result.channels = source.next() == 0 ? 4 : 3;
  result.sample = static_cast<gdpo::Sample>(source.next() % 3);
  result.row_stride = source.next(), result.column_stride = source.next(), result.channel_stride = source.next();
  memory.resize(static_cast<std::size_t>(source.next() & 0x3F) * 40);
  result.data = memory.data(), result.bytes = memory.size();
  return result;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace gdpo;
  Source source(data, size);
  std::vector<std::uint8_t> from, to;
  const auto in = image<ImageView>(source, from);
  auto out = image<ImageSpan>(source, to);
  try {
    detail::check_input(in);
    if (in.size.height * in.size.width > 4096) return 0;  // a stride of 0 makes large pictures of few bytes
    static detail::Pool pool(1);
    const Size larger{in.size.height * 2, in.size.width * 3};
    detail::Resampler(in, larger).window({-3, larger.height + 3}, {0, larger.width}, pool, [](auto, auto, auto) {});
    detail::check_output(out, in, out.size);
    if (out.size.height * out.size.width > 4096) __builtin_trap();  // every sample has memory of its own
    for (std::int64_t y = 0; y < out.size.height; ++y) {
      for (std::int64_t x = 0; x < out.size.width; ++x) {
        for (int c = 0; c < 3; ++c) {
          auto* const at =
              static_cast<char*>(out.data) + y * out.row_stride + x * out.column_stride + c * out.channel_stride;
          std::memset(at, 1, static_cast<std::size_t>(out.sample_bytes()));
        }
      }
    }
  } catch (const InvalidArgument&) {
  }
  return 0;
}
