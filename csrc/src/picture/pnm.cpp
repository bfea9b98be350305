#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <gdpo/pnm.hpp>
#include <system_error>

#include "common.hpp"

namespace gdpo {
namespace {

using detail::text;

[[noreturn]] void fail(const std::string& path) { throw std::system_error(errno, std::generic_category(), path); }

/// Write everything and flush it. @return 0 or an error number
int put(int file, const char* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t count = write(file, data + done, bytes - done);
    if (count < 0 && errno != EINTR) return errno;
    if (count == 0) return ENOSPC;
    done += static_cast<std::size_t>(std::max<ssize_t>(count, 0));
  }
  // Other numbers: a file system that does not flush on request.
  if (fsync(file) != 0 && (errno == EIO || errno == ENOSPC || errno == EDQUOT)) return errno;
  struct stat status;
  if (fstat(file, &status) != 0) return errno;
  return static_cast<std::size_t>(status.st_size) == bytes ? 0 : EIO;
}

/// The header of a PPM: numbers between white space and comments.
class Header {
 public:
  Header(const unsigned char* data, std::size_t bytes) : data_(data), bytes_(bytes) {}

  std::int64_t number(const char* name, std::int64_t limit) {
    while (at_ < bytes_ && (std::isspace(data_[at_]) != 0 || data_[at_] == '#')) {
      if (data_[at_] == '#') {
        while (at_ < bytes_ && data_[at_] != '\n') ++at_;
      } else {
        ++at_;
      }
    }
    std::int64_t value = -1;
    for (; at_ < bytes_ && data_[at_] >= '0' && data_[at_] <= '9'; ++at_) {
      value = std::max<std::int64_t>(value, 0) * 10 + (data_[at_] - '0');
      if (value > limit) throw InvalidArgument(text("a PPM's ", name, " must be 1 to ", limit));
    }
    if (value < 1) throw InvalidArgument(text("a PPM's ", name, " must be 1 to ", limit));
    return value;
  }

  std::size_t at_ = 2;

 private:
  const unsigned char* data_;
  std::size_t bytes_;
};

void swap_halves(std::uint8_t* bytes, std::size_t count) {
  for (std::size_t i = 0; i + 1 < count; i += 2) std::swap(bytes[i], bytes[i + 1]);
}

}  // namespace

Picture::Picture(Size size, Sample sample) : size(size), sample(sample) {
  if (size.height < 1 || size.width < 1 || size.height > kMaxPixels / size.width) {
    throw InvalidArgument(text("a picture must be 1 pixel to a gigapixel; got ", size.height, "x", size.width));
  }
  bytes.resize(static_cast<std::size_t>(size.height * size.width) * 3 * (sample == Sample::u8 ? 1 : 2));
}

ImageView Picture::view() const {
  if (sample == Sample::u8) return ImageView::packed(bytes.data(), size);
  return ImageView::packed(reinterpret_cast<const std::uint16_t*>(bytes.data()), size);
}

ImageSpan Picture::span() {
  if (sample == Sample::u8) return ImageSpan::packed(bytes.data(), size);
  return ImageSpan::packed(reinterpret_cast<std::uint16_t*>(bytes.data()), size);
}

Picture parse_ppm(const void* data, std::size_t bytes, std::int64_t max_pixels) {
  const auto* const start = static_cast<const unsigned char*>(data);
  if (bytes < 2 || start[0] != 'P' || start[1] != '6') throw InvalidArgument("not a binary PPM (P6)");
  Header header(start, bytes);
  const std::int64_t width = header.number("width", 1 << 24), height = header.number("height", 1 << 24);
  const std::int64_t largest = header.number("maximum", 65535);
  if (width > max_pixels / height) {
    throw InvalidArgument(text("a PPM of ", width, "x", height, "; at most ", max_pixels, " pixels are read"));
  }
  if (largest != 255 && largest != 65535)
    throw InvalidArgument(text("a PPM's maximum must be 255 or 65535; got ", largest));
  const std::size_t first = header.at_ + 1;  // one white space ends the header
  Picture picture;
  picture.size = {height, width};
  picture.sample = largest == 255 ? Sample::u8 : Sample::u16;
  const auto needed = static_cast<std::size_t>(width * height) * 3 * (largest == 255 ? 1 : 2);
  if (header.at_ >= bytes || std::isspace(start[header.at_]) == 0 || bytes - first < needed) {
    throw InvalidArgument(text("truncated PPM: ", needed, " bytes of samples are missing or incomplete"));
  }
  picture.bytes.assign(start + first, start + first + needed);
  if (picture.sample == Sample::u16) swap_halves(picture.bytes.data(), needed);
  return picture;
}

Picture read_ppm(const std::string& path, std::int64_t max_pixels) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path);
  const std::vector<char> content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) fail(path);
  try {
    return parse_ppm(content.data(), content.size(), max_pixels);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

void write_file(const std::string& path, const void* data, std::size_t bytes) {
  const std::string staged = path + ".part";
  const int file = open(staged.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) fail(path);
  int error = put(file, static_cast<const char*>(data), bytes);
  if (close(file) != 0 && error == 0) error = errno;
  if (error == 0 && std::rename(staged.c_str(), path.c_str()) != 0) error = errno;
  if (error != 0) {
    std::remove(staged.c_str());
    errno = error;
    fail(path);
  }
}

void write_ppm(const std::string& path, const Picture& picture) {
  const std::string header = text("P6\n", picture.size.width, " ", picture.size.height, "\n",
                                  picture.sample == Sample::u8 ? 255 : 65535, "\n");
  std::vector<std::uint8_t> content(header.begin(), header.end());
  content.insert(content.end(), picture.bytes.begin(), picture.bytes.end());
  if (picture.sample == Sample::u16) swap_halves(content.data() + header.size(), picture.bytes.size());
  write_file(path, content.data(), content.size());
}

}  // namespace gdpo
