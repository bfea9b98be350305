#include <gdpo/gdpo.h>

#include <cstddef>
#include <gdpo/upscaler.hpp>
#include <new>
#include <string>

#include "common.hpp"

struct gdpo_upscaler {
  gdpo::Upscaler handle;
};

namespace {

thread_local std::string last_error;

/// Keep the message; where even that has no memory, an empty one.
gdpo_status failed(gdpo_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

/// Run `work`, turning whatever it throws into a status.
template <typename Work>
gdpo_status guarded(Work&& work) noexcept {
  try {
    work();
    return GDPO_OK;
  } catch (const gdpo::Error& error) {
    return failed(static_cast<gdpo_status>(error.status()), error.what());
  } catch (const std::bad_alloc&) {
    return failed(GDPO_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(GDPO_INTERNAL, error.what());
  } catch (...) {
    return failed(GDPO_INTERNAL, "an unknown exception");
  }
}

/// The caller's structure over the defaults: a caller compiled against an older header gives fewer bytes.
template <typename Struct>
Struct merged(const char* name, const Struct* given, Struct defaults) {
  if (given == nullptr) return defaults;
  if (given->struct_size < sizeof(std::size_t) || given->struct_size > sizeof(Struct)) {
    throw gdpo::InvalidArgument(gdpo::detail::text(name, ": struct_size must be at most ", sizeof(Struct), "; got ",
                                                   given->struct_size, " (start from its default)"));
  }
  const auto* const from = reinterpret_cast<const char*>(given);
  std::copy(from, from + given->struct_size, reinterpret_cast<char*>(&defaults));
  return defaults;
}

std::string string(const char* value) { return value == nullptr ? "" : value; }

template <typename Image>
Image image(const char* name, const gdpo_image* given) {
  if (given == nullptr) throw gdpo::InvalidArgument(gdpo::detail::text(name, " is null"));
  const gdpo_image c = merged(name, given, gdpo_image{});
  Image result;
  result.data = c.data;
  result.bytes = c.bytes;
  result.size = {c.height, c.width};
  result.channels = c.channels;
  if (c.sample != GDPO_U8 && c.sample != GDPO_U16)
    throw gdpo::InvalidArgument(gdpo::detail::text(name, ": unknown sample"));
  result.sample = c.sample == GDPO_U8 ? gdpo::Sample::u8 : gdpo::Sample::u16;
  result.row_stride = c.row_stride;
  result.column_stride = c.column_stride;
  result.channel_stride = c.channel_stride;
  return result;
}

gdpo::Request ours(const gdpo_request* request) {
  const gdpo_request c = merged("request", request, gdpo_request_default());
  gdpo::Request r;
  r.seed = c.seed;
  r.scale = c.scale;
  r.tile = c.tile;
  r.batch = c.batch;
  r.color = static_cast<gdpo::Color>(c.color);
  r.max_pixels = c.max_pixels;
  if (c.progress != nullptr) {
    r.progress = [progress = c.progress, user = c.user](std::int64_t done, std::int64_t total) {
      return progress(user, done, total) != 0;
    };
  }
  return r;
}

}  // namespace

gdpo_options gdpo_options_default() { return {sizeof(gdpo_options), "auto", nullptr, nullptr, 0, 0, 0}; }

gdpo_request gdpo_request_default() {
  return {sizeof(gdpo_request), 0, 4.0, 0, 0, GDPO_WAVELET, nullptr, nullptr, gdpo::kMaxPixels};
}

gdpo_image gdpo_image_packed(void* data, int64_t height, int64_t width, gdpo_sample sample) {
  const int64_t bytes = sample == GDPO_U16 ? 2 : 1;
  const bool sane = height > 0 && width > 0 && height < 1 << 24 && width < 1 << 24;  // else refused when it is used
  return {sizeof(gdpo_image),
          data,
          sane ? static_cast<size_t>(height * width * 3 * bytes) : 0,
          height,
          width,
          sane ? width * 3 * bytes : 0,
          3 * bytes,
          bytes,
          3,
          sample};
}

gdpo_status gdpo_load(const char* folder, const gdpo_options* options, gdpo_upscaler** out) {
  if (out != nullptr) *out = nullptr;
  return guarded([&] {
    if (folder == nullptr || out == nullptr) throw gdpo::InvalidArgument("folder and out must not be null");
    const gdpo_options c = merged("options", options, gdpo_options_default());
    gdpo::Options o;
    if (c.backend != nullptr && *c.backend != 0) o.backend = c.backend;
    o.device = string(c.device);
    o.library = string(c.library);
    o.threads = c.threads;
    o.trust_plan = c.trust_plan != 0;
    o.concurrency = c.concurrency;
    *out = new gdpo_upscaler{gdpo::Upscaler::load(folder, o)};
  });
}

void gdpo_free(gdpo_upscaler* upscaler) { delete upscaler; }

gdpo_status gdpo_upscale(const gdpo_upscaler* upscaler, const gdpo_image* in, const gdpo_image* out,
                         const gdpo_request* request) {
  return guarded([&] {
    if (upscaler == nullptr) throw gdpo::InvalidArgument("upscaler is null");
    upscaler->handle.upscale(image<gdpo::ImageView>("in", in), image<gdpo::ImageSpan>("out", out), ours(request));
  });
}

gdpo_status gdpo_upscale_bands(const gdpo_upscaler* upscaler, const gdpo_image* in, gdpo_sink sink, void* user,
                               const gdpo_request* request) {
  return guarded([&] {
    if (upscaler == nullptr || sink == nullptr) throw gdpo::InvalidArgument("upscaler and sink must not be null");
    const auto hand_on = [&](std::int64_t first, const gdpo::ImageView& rows) {
      const gdpo_sample sample = rows.sample == gdpo::Sample::u8 ? GDPO_U8 : GDPO_U16;
      const gdpo_image band =
          gdpo_image_packed(const_cast<void*>(rows.data), rows.size.height, rows.size.width, sample);
      if (sink(user, first, &band) == 0) throw gdpo::Cancelled(gdpo::detail::text("cancelled at row ", first));
    };
    upscaler->handle.upscale(image<gdpo::ImageView>("in", in), gdpo::BandSink(hand_on), ours(request));
  });
}

gdpo_status gdpo_output_size(int64_t height, int64_t width, double scale, int64_t* out_height, int64_t* out_width) {
  return guarded([&] {
    if (out_height == nullptr || out_width == nullptr)
      throw gdpo::InvalidArgument("out_height and out_width must not be null");
    const gdpo::Size size = gdpo::output_size({height, width}, scale);
    *out_height = size.height;
    *out_width = size.width;
  });
}

const char* gdpo_last_error() { return last_error.c_str(); }

const char* gdpo_version() { return gdpo::version(); }
