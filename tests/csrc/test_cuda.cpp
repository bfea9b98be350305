/// A picture's way on the GPU beside its way on the CPU, with the stand-in of fake_cuda.cpp for libcuda.so.1: the same
/// bytes must come out, whatever the picture, the model and the request.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "api/upscaler.hpp"
#include "check.hpp"
#include "devices/cuda/device.hpp"

using namespace gdpo;
using namespace gdpo::detail;

namespace {

std::int64_t counter(const char* name) {
  const Library library({"libcuda.so.1"});
  return *static_cast<const std::int64_t*>(library.find(name));
}

std::atomic<std::int64_t> distinct{0};  // tiles of a batch that are not the one before again

/// A model of three graphs or of one. What it makes of a sample depends on the sample's place in its tile, so that
/// tiles disagree where they overlap and every weight of the blending counts.
class FakeSession : public Session, public DeviceSession {
 public:
  FakeSession(std::string name, std::int64_t factor, std::int64_t least, std::shared_ptr<Gpu> gpu)
      : name_(std::move(name)), factor_(factor), least_(least), gpu_(std::move(gpu)) {}

  void run(const std::vector<Feed>& inputs, float* output, const Shape& shape) override {
    std::vector<const float*> values;
    for (const auto& feed : inputs) values.push_back(feed.data);
    work(values, output, shape);
  }

  DeviceSession* on_device() override { return gpu_ != nullptr ? this : nullptr; }

  Slots slots(const std::vector<Shape>& inputs, const Shape& output) override {
    memory_.clear();
    Slots slots;
    const auto room = [&](const Shape& s) {
      const std::size_t bytes = elements(s[0], s[1], s[2], s[3], sizeof(float));
      memory_.push_back(std::make_unique<CudaMemory>(gpu_->driver, CudaMemory::device, bytes));
      return memory_.back()->data<float>();
    };
    for (const auto& shape : inputs) slots.inputs.push_back(room(shape));
    slots.output = room(output);
    slots_ = slots;
    shape_ = output;
    return slots;
  }

  void start() override { work({slots_.inputs.begin(), slots_.inputs.end()}, slots_.output, shape_); }

  int bad_call = 0;  // the call, from 1, whose last tile holds an infinity

 private:
  void work(const std::vector<const float*>& in, float* out, const Shape& shape) {
    const std::int64_t channels = shape[1], rows = shape[2], columns = shape[3], f = factor_;
    CHECK(shape[0] >= least_);
    for (std::int64_t n = 0; n < shape[0]; ++n) {
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t y = 0; y < rows; ++y) {
          for (std::int64_t x = 0; x < columns; ++x) {
            const auto at = [&](const float* from, std::int64_t planes, std::int64_t plane, std::int64_t row,
                                std::int64_t column, std::int64_t shrink) {
              const std::int64_t w = shrink < 0 ? columns * -shrink : columns / shrink;
              const std::int64_t h = shrink < 0 ? rows * -shrink : rows / shrink;
              return from[((n * planes + plane) * h + row) * w + column];
            };
            float value = 0;
            if (name_ == "generator") {
              const std::int64_t plane = c * f * f + y % f * f + x % f;
              const float far = at(in[0], 3, c, rows - 1 - y, columns - 1 - x, 1);  // beyond the picture's edge, too
              value =
                  0.8f * at(in[0], 3, c, y, x, 1) + 0.1f * far + 0.05f * at(in[1], 3 * f * f, plane, y / f, x / f, f);
            } else if (name_ == "encoder") {
              value = at(in[0], 3, c % 3, y * f + c % f, x * f + 1, -f);
            } else if (name_ == "unet") {
              value = 0.8f * at(in[0], channels, c, y, x, 1) + 0.2f * at(in[1], channels, c, y, x, 1);
            } else {
              value = at(in[0], 13, c, y / f, x / f, f);
            }
            out[((n * channels + c) * rows + y) * columns + x] =
                value + 0.01f * static_cast<float>((7 * y + 3 * x) % 11 - 5);
          }
        }
      }
    }
    const std::size_t tile = elements(channels, rows, columns);
    for (std::int64_t n = 0; n < shape[0]; ++n, out += tile) {
      distinct += n == 0 || std::memcmp(out, out - tile, tile * sizeof(float)) != 0;
    }
    if (++calls_ == bad_call) {
      out[-1] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  const std::string name_;
  const std::int64_t factor_, least_;
  const std::shared_ptr<Gpu> gpu_;
  std::vector<std::unique_ptr<CudaMemory>> memory_;
  Slots slots_{{}, nullptr};
  Shape shape_;
  int calls_ = 0;
};

/// @param staged encoder, unet and decoder, 13 latent channels at an eighth; else a generator, 48 at a quarter
/// @param batch of the profile: least, usual, largest
Upscaler upscaler(bool staged, std::shared_ptr<Gpu> gpu, int bad_call = 0, Span batch = {1, 2, 8}) {
  detail::Model model;
  Manifest& manifest = model.manifest;
  manifest.geometry = staged ? Geometry{4, 8, 13, 16, 32} : Geometry{4, 4, 48, 16, 32};
  manifest.batch = batch;
  manifest.tile = {64, 96, 1024};
  for (const char* const name : {"generator", "encoder", "unet", "decoder"}) {
    if ((std::string(name) == "generator") == staged) continue;
    manifest.graphs[name] = {};
    auto session = std::make_unique<FakeSession>(name, manifest.geometry.factor, batch[0], gpu);
    if (std::string(name) == (staged ? "unet" : "generator")) session->bad_call = bad_call;
    model.sessions[name] = std::move(session);
  }
  Options options;
  options.threads = 2;
  return Upscaler::Impl::wrap(std::make_shared<const Upscaler::Impl>(std::move(model), "tensorrt", "0", options,
                                                                     gpu ? cuda_accelerator(gpu) : nullptr));
}

std::vector<std::uint8_t> noise_bytes(std::size_t count) {
  std::vector<std::uint8_t> bytes(count);
  std::uint32_t state = 1;
  for (std::size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    bytes[i] = static_cast<std::uint8_t>((state >> 24) / 4 + i / 90 % 180);
  }
  return bytes;
}

/// A picture whose samples lie in one of three ways: packed, with a gap after each row and pixel, or as planes.
template <typename Image, typename Byte>
Image layout(Byte* data, std::size_t bytes, Size size, Sample sample, int kind) {
  Image image;
  image.data = data, image.bytes = bytes, image.size = size, image.sample = sample;
  const std::int64_t item = image.sample_bytes();
  image.channel_stride = kind == 2 ? size.height * (size.width + 3) * item : item;
  image.column_stride = kind == 0 ? 3 * item : kind == 1 ? 4 * item : item;
  image.row_stride = (size.width + (kind == 0 ? 0 : 3)) * image.column_stride;
  return image;
}

std::vector<std::uint8_t> upscaled(const Upscaler& up, Size size, Sample sample, int kind, const Request& request) {
  const std::int64_t item = sample == Sample::u8 ? 1 : 2;
  const Size target = output_size(size, request.scale);
  const auto in = noise_bytes(elements(size.height, size.width + 3, 4, item));
  std::vector<std::uint8_t> out(elements(target.height, target.width + 3, 4, item), 77);
  up.upscale(layout<ImageView>(in.data(), in.size(), size, sample, kind),
             layout<ImageSpan>(out.data(), out.size(), target, sample, (kind + 1) % 3), request);
  return out;
}

const std::shared_ptr<Gpu>& gpu() {
  static const auto one = std::make_shared<Gpu>(0);
  return one;
}

}  // namespace

TEST(every_request_has_the_bytes_of_the_cpu) {
  int number = 0;
  for (const bool staged : {false, true}) {
    const Upscaler cpu = upscaler(staged, nullptr), cuda = upscaler(staged, gpu());
    for (const Size size : {Size{61, 83}, {5, 140}, {33, 16}, {1, 1}}) {
      for (const Color color : {Color::adain, Color::wavelet, Color::none}) {
        for (const double scale : {4.0, 2.5, 7.0}) {
          Request request;
          request.seed = 0x0123456789ABCDEF * static_cast<std::uint64_t>(++number);
          request.color = color;
          request.scale = scale;
          request.tile = std::array{0, 16, 30, 200}[number % 4];
          request.batch = std::array{0, 1, 3}[number % 3];
          const Sample sample = number % 2 == 0 ? Sample::u8 : Sample::u16;
          const int kind = number / 2 % 3;
          CHECK(upscaled(cuda, size, sample, kind, request) == upscaled(cpu, size, sample, kind, request));
        }
      }
    }
  }
}

TEST(bands_from_the_gpu_are_the_rows_of_the_whole) {
  const Upscaler cuda = upscaler(true, gpu());
  const auto in = noise_bytes(elements(61, 83, 3));
  const auto view = ImageView::packed(in.data(), {61, 83});
  Request request;
  request.color = Color::wavelet;
  request.scale = 7;  // more than the pinned memory holds at once
  std::vector<std::uint8_t> whole(elements(61 * 7, 83 * 7, 3)), rows;
  cuda.upscale(view, ImageSpan::packed(whole.data(), {61 * 7, 83 * 7}), request);
  const BandSink sink = [&](std::int64_t first, const ImageView& band) {
    CHECK(first * band.row_stride == static_cast<std::int64_t>(rows.size()));
    const auto* const data = static_cast<const std::uint8_t*>(band.data);
    rows.insert(rows.end(), data, data + band.size.height * band.row_stride);
  };
  cuda.upscale(view, sink, request);
  CHECK(rows == whole);
}

TEST(a_static_batch_is_filled_up) {
  for (const bool staged : {false, true}) {
    const Upscaler plain = upscaler(staged, nullptr);
    Request request;
    request.tile = 24;
    for (const Size size : {Size{61, 83}, {1, 1}}) {
      const auto expected = upscaled(plain, size, Sample::u8, 0, request);
      for (const auto& on : {std::shared_ptr<Gpu>(), gpu()}) {
        std::int64_t last = 0, all = 0;
        distinct = 0;
        Request counted = request;
        counted.progress = [&](std::int64_t done, std::int64_t total) {
          last = done, all = total;
          return true;
        };
        CHECK(upscaled(upscaler(staged, on, 0, {3, 3, 3}), size, Sample::u8, 0, counted) == expected);
        CHECK(last == all && distinct == all);  // tiles; what fills up is the last of them again
      }
    }
  }
}

TEST(a_tall_picture_is_low_passed_in_bands) {
  const Upscaler cpu = upscaler(false, nullptr), cuda = upscaler(false, gpu());
  Request request;
  request.color = Color::wavelet;
  request.tile = 256;
  CHECK(upscaled(cuda, {530, 9}, Sample::u8, 0, request) == upscaled(cpu, {530, 9}, Sample::u8, 0, request));
}

TEST(what_is_flat_stays_flat) {
  const Upscaler cpu = upscaler(false, nullptr), cuda = upscaler(false, gpu());
  const Size size{40, 60};
  std::vector<std::uint8_t> in(elements(size.height, size.width, 3));
  for (std::size_t i = 0; i < in.size(); ++i) {
    const std::size_t x = i / 3 % 60;
    in[i] = static_cast<std::uint8_t>(x < 30 ? 90 + x % 3 : (x + i / 180) % 2 * 255);
  }
  std::int64_t off[2] = {0, 0};
  for (const Color color : {Color::none, Color::wavelet}) {
    std::vector<std::uint8_t> out[2];
    Request request;
    request.color = color;
    for (int i = 0; i < 2; ++i) {
      out[i].resize(16 * in.size());
      (i == 0 ? cpu : cuda)
          .upscale(ImageView::packed(in.data(), size), ImageSpan::packed(out[i].data(), {160, 240}), request);
    }
    CHECK(out[0] == out[1]);
    for (std::size_t i = 0; i < out[1].size(); ++i) {
      if (i / 3 % 240 >= 4 * 29) continue;
      auto& most = off[color == Color::wavelet ? 1 : 0];
      most = std::max<std::int64_t>(most, std::abs(out[1][i] - 91));
    }
  }
  CHECK(off[0] > 10 && off[1] <= 3);
}

TEST(more_rows_than_a_grid_has_blocks_are_done) {
  const Upscaler cpu = upscaler(false, nullptr), cuda = upscaler(false, gpu());
  Request request;
  request.tile = 256;
  CHECK(upscaled(cuda, {16400, 1}, Sample::u8, 0, request) == upscaled(cpu, {16400, 1}, Sample::u8, 0, request));
}

TEST(a_picture_larger_than_the_pinned_memory_crosses_in_pieces) {
  const Upscaler cpu = upscaler(false, nullptr), cuda = upscaler(false, gpu());
  Request request;
  request.color = Color::none;
  request.tile = 256;
  const Size size{300, 600};  // more than 1 MiB of 16-bit samples
  CHECK(upscaled(cuda, size, Sample::u16, 1, request) == upscaled(cpu, size, Sample::u16, 1, request));
}

TEST(a_picture_crosses_once_each_way) {
  const Upscaler cuda = upscaler(false, gpu());
  const Size size{200, 260};
  const std::int64_t up = counter("fake_cuda_up"), down = counter("fake_cuda_down");
  std::int64_t calls = 0;
  Timing timing;
  Request request;
  request.batch = 1;
  request.timing = &timing;
  request.progress = [&](std::int64_t, std::int64_t total) {
    calls = total;
    return true;
  };
  upscaled(cuda, size, Sample::u8, 0, request);
  const std::int64_t samples = size.height * size.width * 3, tables = 40 * 16 * (size.height + size.width);
  CHECK(counter("fake_cuda_down") - down == 16 * samples + 4 * calls);  // and a flag for each tile
  CHECK(counter("fake_cuda_up") - up >= samples && counter("fake_cuda_up") - up <= samples + tables);
  CHECK(calls > 50 && std::abs(timing.backend - 1e-3 * static_cast<double>(calls)) < 1e-9);
}

TEST(a_picture_without_room_goes_the_way_of_the_cpu) {
  const Upscaler cpu = upscaler(true, nullptr), cuda = upscaler(true, gpu());
  const std::int64_t up = counter("fake_cuda_up");
  for (const char* const little : {"FAKE_CUDA_FREE", "FAKE_CUDA_LARGEST"}) {  // in all, or in one piece
    setenv(little, "100000", 1);
    CHECK(upscaled(cuda, {61, 83}, Sample::u8, 0, {}) == upscaled(cpu, {61, 83}, Sample::u8, 0, {}));
    CHECK(counter("fake_cuda_up") == up);
    unsetenv(little);
  }
  upscaled(cuda, {61, 83}, Sample::u8, 0, {});
  CHECK(counter("fake_cuda_up") > up);
}

TEST(a_gpu_that_the_library_has_no_code_for_leaves_it_to_the_cpu) {
  setenv("FAKE_CUDA_NO_CODE", "1", 1);
  const std::int64_t before = counter("fake_cuda_live");
  CHECK(cuda_accelerator(gpu()) == nullptr && counter("fake_cuda_live") == before);
  unsetenv("FAKE_CUDA_NO_CODE");
}

TEST(a_value_that_is_not_finite_names_the_same_tile) {
  for (const bool staged : {false, true}) {
    std::string messages[2];
    for (const bool on_cuda : {false, true}) {
      const Upscaler up = upscaler(staged, on_cuda ? gpu() : nullptr, 3);
      try {
        upscaled(up, {61, 83}, Sample::u8, 0, {});
      } catch (const NotFinite& error) {
        messages[on_cuda] = error.what();
      }
      upscaled(up, {61, 83}, Sample::u8, 0, {});  // and goes on
    }
    CHECK(messages[0] == messages[1] && messages[0].find("not finite in the tile at row") != std::string::npos);
  }
}

TEST(cancelling_leaves_the_object_usable) {
  const Upscaler cpu = upscaler(false, nullptr), cuda = upscaler(false, gpu());
  Request request;
  request.progress = [](std::int64_t done, std::int64_t) { return done < 4; };
  THROWS(Cancelled, "cancelled after", upscaled(cuda, {61, 83}, Sample::u8, 0, request));
  CHECK(upscaled(cuda, {61, 83}, Sample::u8, 0, {}) == upscaled(cpu, {61, 83}, Sample::u8, 0, {}));
}

TEST(threads_share_the_gpu) {
  const Upscaler cpu = upscaler(true, nullptr), cuda = upscaler(true, gpu());
  std::vector<std::thread> threads;
  std::vector<std::uint8_t> results[3];
  for (auto& result : results) {
    threads.emplace_back([&] { result = upscaled(cuda, {61, 83}, Sample::u8, 0, {}); });
  }
  for (auto& thread : threads) thread.join();
  const auto expected = upscaled(cpu, {61, 83}, Sample::u8, 0, {});
  for (const auto& result : results) CHECK(result == expected);
}

TEST(everything_that_was_made_ends) {
  const std::int64_t before = counter("fake_cuda_live");
  {
    const auto own = std::make_shared<Gpu>(0);
    const Upscaler cuda = upscaler(false, own);
    upscaled(cuda, {61, 83}, Sample::u8, 0, {});
    CHECK(counter("fake_cuda_live") > before);
  }
  CHECK(counter("fake_cuda_live") == before);
}

int main() { return check::main(); }
