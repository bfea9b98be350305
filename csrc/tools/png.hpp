/// PNG files through libpng, 8 and 16 bit.
#pragma once

#include <png.h>

#include <cerrno>
#include <cstdio>
#include <gdpo/pnm.hpp>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

namespace gdpo {
namespace png {

struct Close {
  void operator()(std::FILE* f) const { std::fclose(f); }
};
using File = std::unique_ptr<std::FILE, Close>;

inline File open(const std::string& path) {
  File file(std::fopen(path.c_str(), "rb"));
  if (!file) throw std::system_error(errno, std::generic_category(), path);
  return file;
}

/// libpng reports through this; an exception passes through its frames, which own nothing.
[[noreturn]] inline void fail(png_structp png, png_const_charp message) {
  throw InvalidArgument(*static_cast<const std::string*>(png_get_error_ptr(png)) + ": PNG: " + message);
}
inline void ignore(png_structp, png_const_charp) {}

inline void append(png_structp png, png_bytep data, png_size_t bytes) {
  auto* content = static_cast<std::vector<png_byte>*>(png_get_io_ptr(png));
  content->insert(content->end(), data, data + bytes);
}

/// What `fail` finds again: the path.
inline void* owner(const std::string& path) { return const_cast<std::string*>(&path); }

inline std::vector<png_bytep> rows(Picture& picture) {
  const std::size_t stride = picture.bytes.size() / static_cast<std::size_t>(picture.size.height);
  std::vector<png_bytep> result;
  for (std::size_t at = 0; at < picture.bytes.size(); at += stride) result.push_back(picture.bytes.data() + at);
  return result;
}

}  // namespace png

/// RGB of any PNG that is not transparent; palettes and gray are expanded.
inline Picture read_png(const std::string& path, std::int64_t max_pixels) {
  const png::File file = png::open(path);
  png_structp reader = png_create_read_struct(PNG_LIBPNG_VER_STRING, png::owner(path), png::fail, png::ignore);
  if (reader == nullptr) throw std::bad_alloc();
  png_infop info = png_create_info_struct(reader);
  const auto free = [&](void*) { png_destroy_read_struct(&reader, &info, nullptr); };
  const std::unique_ptr<void, decltype(free)> guard(reader, free);
  if (info == nullptr) throw std::bad_alloc();
  png_init_io(reader, file.get());
  png_read_info(reader, info);
  const std::int64_t width = png_get_image_width(reader, info), height = png_get_image_height(reader, info);
  if (width > max_pixels / height) throw InvalidArgument(path + ": too many pixels");
  if ((png_get_color_type(reader, info) & PNG_COLOR_MASK_ALPHA) != 0 ||
      png_get_valid(reader, info, PNG_INFO_tRNS) != 0) {
    throw InvalidArgument(path + ": transparent pictures are not read; use python -m engine.upscale");
  }
  png_set_expand(reader);
  png_set_gray_to_rgb(reader);
  const bool deep = png_get_bit_depth(reader, info) == 16;
  if (deep) png_set_swap(reader);
  png_set_interlace_handling(reader);
  png_read_update_info(reader, info);
  Picture picture({height, width}, deep ? Sample::u16 : Sample::u8);
  if (png_get_rowbytes(reader, info) * static_cast<std::size_t>(height) != picture.bytes.size()) {
    throw InvalidArgument(path + ": an unknown kind of PNG");
  }
  auto lines = png::rows(picture);
  png_read_image(reader, lines.data());
  png_read_end(reader, nullptr);
  return picture;
}

/// A whole file or nothing.
inline void write_png(const std::string& path, const Picture& picture) {
  std::vector<png_byte> content;
  png_structp writer = png_create_write_struct(PNG_LIBPNG_VER_STRING, png::owner(path), png::fail, png::ignore);
  if (writer == nullptr) throw std::bad_alloc();
  png_infop info = png_create_info_struct(writer);
  const auto free = [&](void*) { png_destroy_write_struct(&writer, &info); };
  const std::unique_ptr<void, decltype(free)> guard(writer, free);
  if (info == nullptr) throw std::bad_alloc();
  png_set_write_fn(writer, &content, png::append, nullptr);
  const int depth = picture.sample == Sample::u8 ? 8 : 16;
  png_set_IHDR(writer, info, static_cast<png_uint_32>(picture.size.width),
               static_cast<png_uint_32>(picture.size.height), depth, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_set_compression_level(writer, 3);
  png_write_info(writer, info);
  if (depth == 16) png_set_swap(writer);
  Picture copy = picture;
  auto lines = png::rows(copy);
  png_write_image(writer, lines.data());
  png_write_end(writer, nullptr);
  write_file(path, content.data(), content.size());
}

}  // namespace gdpo
