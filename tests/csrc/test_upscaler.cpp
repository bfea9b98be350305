/// The whole library with a model: test_upscaler FOLDERS, which folders.py wrote.
#include <gdpo/pnm.hpp>
#include <gdpo/upscaler.hpp>
#include <stdexcept>

#include "api/upscaler.hpp"
#include "check.hpp"

using namespace gdpo;

namespace {

std::string root;

Picture upscaled(const Upscaler& up, const Picture& in, const Request& request = {}) {
  Picture out(output_size(in.size, request.scale), in.sample);
  up.upscale(in.view(), out.span(), request);
  return out;
}

Picture photo() { return read_ppm(root + "/in.ppm"); }

Request tiled() {
  Request request;
  request.seed = 7;
  request.tile = 24;
  return request;
}

/// Gives what a real session gives until call number `bad`, which fails as `kind` says.
class Faulty : public detail::Session {
 public:
  void run(const std::vector<detail::Feed>&, float* output, const detail::Shape& shape) override {
    const std::size_t count = detail::elements(shape[0], shape[1], shape[2], shape[3]);
    std::fill_n(output, count, 0.25f);
    if (++calls == 3) output[count / 2] = std::numeric_limits<float>::infinity();
  }
  int calls = 0;
};

}  // namespace

TEST(pictures_are_those_of_python) {
  const auto up = Upscaler::load(root + "/plain");
  CHECK(up.backend() == "onnx" && !up.backend_version().empty());
  const Picture in = photo();
  Request adain = tiled();
  adain.color = Color::adain;
  Request other = tiled();
  other.scale = 2.5;
  for (const auto& [name, request] : {std::pair("tiled", tiled()), {"adain", adain}, {"other", other}}) {
    CHECK(upscaled(up, in, request).bytes == read_ppm(root + "/expected-" + name + ".ppm").bytes);
  }
}

TEST(any_layout_in_memory_gives_the_same) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture in = photo(), expected = upscaled(up, in);
  const std::int64_t h = in.size.height, w = in.size.width;
  std::vector<std::uint8_t> rgba(h * w * 4), planes(expected.bytes.size());
  for (std::int64_t i = 0; i < h * w; ++i) {
    for (int c = 0; c < 3; ++c) rgba[4 * i + c] = in.bytes[3 * i + c];
  }
  ImageView view = in.view();
  view.data = rgba.data(), view.bytes = rgba.size(), view.column_stride = 4, view.row_stride = 4 * w;
  ImageSpan span = ImageSpan::packed(planes.data(), expected.size);
  span.column_stride = 1, span.row_stride = 4 * w, span.channel_stride = 16 * h * w;
  up.upscale(view, span);
  for (std::size_t i = 0; i < planes.size(); ++i)
    CHECK(planes[i] == expected.bytes[i % (16 * h * w) * 3 + i / (16 * h * w)]);
}

TEST(bands_are_the_rows_of_the_whole_from_the_top_to_the_bottom) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture in = photo();
  for (const Color color : {Color::wavelet, Color::adain, Color::none}) {
    for (const double scale : {4.0, 2.5, 0.6, 7.0}) {
      Request request = tiled();
      request.color = color;
      request.scale = scale;
      const Picture whole = upscaled(up, in, request);
      std::vector<std::uint8_t> rows;
      int bands = 0;
      const BandSink sink = [&](std::int64_t first, const ImageView& band) {
        CHECK(first * whole.size.width * 3 == static_cast<std::int64_t>(rows.size()));
        CHECK(band.size.width == whole.size.width && band.row_stride == 3 * band.size.width);
        const auto* const data = static_cast<const std::uint8_t*>(band.data);
        rows.insert(rows.end(), data, data + band.size.height * band.row_stride);
        ++bands;
      };
      up.upscale(in.view(), sink, request);
      CHECK(rows == whole.bytes);
      CHECK(bands > 1 || color == Color::adain || scale < 1);
    }
  }
  THROWS(InvalidArgument, "sink must be a function", up.upscale(in.view(), BandSink(), tiled()));
  const BandSink full = [](std::int64_t, const ImageView&) { throw std::out_of_range("disk full"); };
  THROWS(std::out_of_range, "disk full", up.upscale(in.view(), full, tiled()));
  CHECK(upscaled(up, in, tiled()).bytes == read_ppm(root + "/expected-tiled.ppm").bytes);
}

TEST(a_neutral_picture_stays_neutral) {
  const auto up = Upscaler::load(root + "/plain");
  for (const Sample sample : {Sample::u8, Sample::u16}) {
    Picture in({30, 40}, sample);
    const std::size_t item = sample == Sample::u8 ? 1 : 2;
    for (std::size_t i = 0; i < in.bytes.size(); ++i) in.bytes[i] = static_cast<std::uint8_t>(i / (3 * item) * 37);
    const auto colourful = [&](const Picture& picture) {
      std::size_t count = 0;
      for (std::size_t i = 0; i < picture.bytes.size(); i += 3 * item) {
        for (std::size_t k = item; k < 3 * item; ++k) count += picture.bytes[i + k] != picture.bytes[i + k % item];
      }
      return count;
    };
    for (const Color color : {Color::wavelet, Color::adain, Color::none}) {
      for (const double scale : {4.0, 3.0}) {
        Request request = tiled();
        request.color = color;
        request.scale = scale;
        CHECK(colourful(upscaled(up, in, request)) == 0);
        std::vector<std::uint8_t> rows;
        const BandSink sink = [&](std::int64_t, const ImageView& band) {
          const auto* const data = static_cast<const std::uint8_t*>(band.data);
          rows.insert(rows.end(), data, data + band.size.height * band.row_stride);
        };
        up.upscale(in.view(), sink, request);
        CHECK(rows == upscaled(up, in, request).bytes);
      }
    }
    in.bytes[7 * item] ^= 1;  // one sample, and it is a picture in colour
    CHECK(colourful(upscaled(up, in, tiled())) > 100);
  }
}

TEST(flat_areas_keep_their_colours_by_default) {
  const auto up = Upscaler::load(root + "/plain");
  Picture in({64, 64}, Sample::u8);
  for (std::int64_t i = 0; i < 64 * 64; ++i) {
    const bool line = i % 64 < 20 && i % 2 == 0;  // fine lines beside three flat areas
    const std::uint8_t flat = i / 64 < 32 ? 40 : 200;
    in.bytes[3 * i] = line ? 255 : flat, in.bytes[3 * i + 1] = line ? 0 : 128, in.bytes[3 * i + 2] = line ? 0 : 60;
  }
  const auto moved = [&](Color color) {
    Request request;
    request.color = color;
    const Picture out = upscaled(up, in, request);
    double most = 0;
    for (const std::int64_t top : {40, 176}) {
      for (int c = 0; c < 3; ++c) {
        double sum = 0;
        for (std::int64_t y = top; y < top + 32; ++y) {
          for (std::int64_t x = 180; x < 212; ++x) sum += out.bytes[(y * 256 + x) * 3 + c];
        }
        const double wanted = c == 0 ? (top < 128 ? 40 : 200) : c == 1 ? 128 : 60;
        most = std::max(most, std::abs(sum / 1024 - wanted));
      }
    }
    return most;
  };
  CHECK(Request().color == Color::wavelet && moved(Color::wavelet) <= 2);
}

TEST(the_largest_picture_is_the_callers_choice) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture in = photo();
  Request request = tiled();
  request.max_pixels = in.size.height * in.size.width * 16 - 1;
  THROWS(InvalidArgument, "megapixels; at most", upscaled(up, in, request));
  THROWS(InvalidArgument, "megapixels; at most", output_size(in.size, 4, request.max_pixels));
  ++request.max_pixels;
  upscaled(up, in, request);
}

TEST(a_batch_gives_what_single_calls_give) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture a = photo();
  Picture b({20, 31}, Sample::u16);
  for (std::size_t i = 0; i < b.bytes.size(); ++i) b.bytes[i] = static_cast<std::uint8_t>(i * 37);
  Picture out_a(output_size(a.size), a.sample), out_b(output_size(b.size), b.sample);
  std::int64_t last = 0, all = 0;
  Request request = tiled();
  request.progress = [&](std::int64_t done, std::int64_t total) {
    CHECK(done > last);
    last = done, all = total;
    return true;
  };
  Timing timing;
  request.timing = &timing;
  up.upscale({a.view(), b.view()}, {out_a.span(), out_b.span()}, request);
  CHECK(last == all && timing.backend > 0 && timing.total > timing.backend);
  CHECK(out_a.bytes == upscaled(up, a, tiled()).bytes && out_b.bytes == upscaled(up, b, tiled()).bytes);
  THROWS(InvalidArgument, "as many pictures", up.upscale(std::vector{a.view()}, std::vector<ImageSpan>{}, request));
}

TEST(cancelling_in_the_middle_throws_and_leaves_the_object_usable) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture in = photo();
  Request request = tiled();
  request.progress = [](std::int64_t done, std::int64_t) { return done < 2; };
  THROWS(Cancelled, "cancelled after 2 of", upscaled(up, in, request));
  request.progress = [](std::int64_t, std::int64_t) -> bool { throw std::out_of_range("mine"); };
  THROWS(std::out_of_range, "mine", upscaled(up, in, request));
  CHECK(upscaled(up, in, tiled()).bytes == read_ppm(root + "/expected-tiled.ppm").bytes);
}

TEST(bad_requests_are_named) {
  const auto up = Upscaler::load(root + "/plain");
  const Picture in = photo();
  const auto with = [&](auto change) {
    Request request;
    change(request);
    upscaled(up, in, request);
  };
  THROWS(InvalidArgument, "tile must be 16 to 256 input pixels for this model; got 8",
         with([](auto& r) { r.tile = 8; }));
  THROWS(InvalidArgument, "tile must be", with([](auto& r) { r.tile = -20; }));
  THROWS(InvalidArgument, "batch must be 1 to 8 for this model; got 9", with([](auto& r) { r.batch = 9; }));
  THROWS(InvalidArgument, "color must be", with([](auto& r) { r.color = static_cast<Color>(7); }));
  THROWS(InvalidArgument, "scale must be", with([](auto& r) { r.scale = 100; }));
  Picture small({4, 4}, in.sample);
  THROWS(InvalidArgument, "out: size must be", up.upscale(in.view(), small.span()));
}

TEST(folders_that_cannot_be_used_say_why) {
  Options tensorrt;
  tensorrt.backend = "tensorrt";
  THROWS(FolderError, "no such folder", Upscaler::load(root + "/nowhere"));
  THROWS(FolderError, "this folder is empty", Upscaler::load(root + "/empty"));
  THROWS(FolderError, "damaged or edited", Upscaler::load(root + "/edited"));
  THROWS(FolderError, "is not the manifest's", Upscaler::load(root + "/stale"));
  THROWS(FolderError, "not a regular file", Upscaler::load(root + "/linked"));
  THROWS(FolderError, "inputs are picture, noise", Upscaler::load(root + "/inputs"));
  THROWS(FolderError, "ONNX Runtime refuses it", Upscaler::load(root + "/truncated"));
  THROWS(FolderError, "is for onnx, not tensorrt", Upscaler::load(root + "/plain", tensorrt));
}

TEST(what_is_missing_is_named_with_its_remedy) {
  Options options;
  options.library = root + "/nowhere.so";
  THROWS(BackendError, "pip install onnxruntime", Upscaler::load(root + "/plain", options));
  options.library = "libm.so.6";
  THROWS(BackendError, "is not ONNX Runtime", Upscaler::load(root + "/plain", options));
  options = {};
  options.device = "cuda";
  THROWS(BackendError, "onnxruntime-gpu", Upscaler::load(root + "/plain", options));
  options.device = "tpu";
  THROWS(InvalidArgument, "device must be", Upscaler::load(root + "/plain", options));
  options = {};
  options.threads = -1;
  THROWS(InvalidArgument, "threads must be", Upscaler::load(root + "/plain", options));
  options = {};
  options.backend = "tflite";
  THROWS(InvalidArgument, "backend must be", Upscaler::load(root + "/plain", options));
}

TEST(a_value_that_is_not_finite_names_its_tile) {
  detail::Model model{detail::load_manifest(root + "/plain"), {}};
  model.sessions["generator"] = std::make_unique<Faulty>();
  const auto up =
      Upscaler::Impl::wrap(std::make_shared<const Upscaler::Impl>(std::move(model), "onnx", "0", Options{}));
  const Picture in = photo();
  THROWS(NotFinite, "the generator gave a value that is not finite in the tile at row", upscaled(up, in, tiled()));
}

int main(int count, char** values) {
  if (count != 2) return 2;
  root = values[1];
  return check::main();
}
