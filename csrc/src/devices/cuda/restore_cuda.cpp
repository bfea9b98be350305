#include "devices/cuda/restore_cuda.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "devices/cuda/launch.hpp"
#include "devices/cuda/memory_cuda.hpp"
#include "picture/noise.hpp"
#include "picture/restore.hpp"

namespace gdpo::detail {
namespace {

constexpr std::size_t kStaging = std::size_t{1} << 20;  // pinned memory that pictures pass through, piece by piece
constexpr std::size_t kKept = std::size_t{1} << 30;     // device memory that stays from picture to picture

CUdeviceptr address(const void* device) { return reinterpret_cast<CUdeviceptr>(device); }

/// What stays from picture to picture.
struct Machine {
  Machine(std::shared_ptr<Gpu> on, std::unique_ptr<const Kernels> loaded)
      : gpu(std::move(on)),
        kernels(std::move(loaded)),
        staging(gpu->driver, CudaMemory::pinned, kStaging),
        quantiles(gpu->driver, CudaMemory::device, sizeof(float) << 16),
        begin(gpu->driver),
        end(gpu->driver) {
    gpu->stream.upload(quantiles.address(), quantile_table(), quantiles.size());
    gpu->stream.synchronize();
  }

  const std::shared_ptr<Gpu> gpu;
  const std::unique_ptr<const Kernels> kernels;
  const CudaMemory staging, quantiles;
  const Event begin, end;
  std::optional<CudaMemory> memory;
};

/// Visit pixels of a picture, counted along its rows, beside packed samples: copy(packed, strided, bytes).
template <typename Void, typename Copy>
void visit(const BasicImage<Void>& image, Range pixels, char* packed, const Copy& copy) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  const std::int64_t item = image.sample_bytes(), width = image.size.width;
  const bool dense = image.channel_stride == item && image.column_stride == 3 * item;
  while (pixels.length() > 0) {
    const std::int64_t x = pixels.first % width, count = std::min(width - x, pixels.length());
    Byte* const row =
        static_cast<Byte*>(image.data) + pixels.first / width * image.row_stride + x * image.column_stride;
    if (dense) copy(packed, row, 3 * item * count);
    for (std::int64_t i = 0; i < 3 * count && !dense; ++i) {
      Byte* const sample = row + i / 3 * image.column_stride + i % 3 * image.channel_stride;
      copy(packed + i * item, sample, item);
    }
    packed += 3 * item * count;
    pixels.first += count;
  }
}

/// One picture; the caller holds the GPU's lock.
class CudaRun {
 public:
  CudaRun(Machine& machine, const Memory& memory, const Upscaler::Impl& up, const Plan& plan, const Request& request,
          float full, const Step& step, double* seconds)
      : machine_(machine),
        stream_(machine.gpu->stream),
        memory_(memory),
        up_(up),
        plan_(plan),
        geometry_(up.manifest.geometry),
        request_(request),
        full_(full),
        step_(step),
        seconds_(seconds) {}

  void run(const ImageView& in, const ImageSpan& out) {
    stream_.upload(machine_.memory->address(), memory_.constants.data(), memory_.constants.size());
    pieces(in, [&](Range pixels, char* staging, CUdeviceptr offset, std::size_t bytes) {
      visit(in, pixels, staging, [](char* to, const char* from, std::int64_t count) { std::memcpy(to, from, count); });
      stream_.upload(address(memory_.source) + offset, staging, bytes);
      stream_.synchronize();
    });
    restore();
    align(out);
    pieces(out, [&](Range pixels, char* staging, CUdeviceptr offset, std::size_t bytes) {
      stream_.download(staging, address(memory_.result) + offset, bytes);
      stream_.synchronize();
      visit(out, pixels, staging, [](const char* from, char* to, std::int64_t count) { std::memcpy(to, from, count); });
    });
  }

 private:
  /// One input of a graph: what fills its slot with tiles.
  struct Input {
    std::int64_t channels, resolution;
    std::function<void(const Row& row, std::int64_t places, float* slot)> fill;
  };

  /// Call move(pixels, staging memory, offset in bytes, bytes) for all of a picture, a piece at a time.
  template <typename Image, typename Move>
  void pieces(const Image& image, const Move& move) {
    const std::int64_t pixel = 3 * image.sample_bytes(), most = static_cast<std::int64_t>(kStaging) / pixel;
    const std::int64_t all = image.size.height * image.size.width;
    for (std::int64_t first = 0; first < all; first += most) {
      const Range pixels{first, std::min(first + most, all)};
      move(pixels, machine_.staging.data<char>(), static_cast<CUdeviceptr>(first * pixel),
           elements(pixels.length(), pixel));
    }
  }

  template <typename Kernel>
  void launch(const Kernel& kernel) {
    machine_.kernels->launch(stream_, kernel);
  }

  /// From the input to memory_.picture, colours not aligned yet.
  void restore() {
    const std::int64_t f = geometry_.factor, channels = geometry_.channels;
    const std::int64_t tall = plan_.rows.tile, wide = plan_.columns.tile;
    const Input images{3, f, [=](const Row& row, std::int64_t places, float* slot) {
                         launch(Images{{places, tall * f, wide * f}, memory_.in, 2.0f / full_, f, row, slot});
                       }};
    const Input noises{channels, 1, [=](const Row& row, std::int64_t places, float* slot) {
                         const Extent extent{places * ceil_div(channels, 8), tall, wide};
                         launch(Noises{extent, request_.seed, machine_.quantiles.data<float>(), channels, row, slot});
                       }};
    const auto cut = [=](const float* field) {
      return Input{channels, 1, [=](const Row& row, std::int64_t places, float* slot) {
                     const Extent extent{places * channels, tall, wide};
                     launch(Cut{extent, field, channels, plan_.rows.end(), plan_.columns.end(), row, slot});
                   }};
    };
    stream_.zero(address(memory_.not_finite), elements(most_places(plan_), sizeof(std::int32_t)));
    stream_.zero(address(memory_.band), elements(3, tall * f, plan_.columns.end() * f, sizeof(float)));
    if (up_.sessions.count("generator") != 0) return stage("generator", {images, noises}, nullptr);
    for (float* const field : memory_.fields) {
      stream_.zero(address(field), elements(channels, plan_.rows.end(), plan_.columns.end(), sizeof(float)));
    }
    stage("encoder", {images}, memory_.fields[0]);
    stage("unet", {cut(memory_.fields[0]), noises}, memory_.fields[1]);
    stage("decoder", {cut(memory_.fields[1])}, nullptr);
  }

  /// Run all tiles of a graph and blend them into a field, or, where that is null, into memory_.picture.
  void stage(const char* name, const std::vector<Input>& inputs, float* field) {
    DeviceSession& session = *up_.sessions.at(name)->on_device();
    const Axis &rows = plan_.rows, &columns = plan_.columns;
    const bool last = field == nullptr;
    const std::int64_t resolution = last ? geometry_.factor : 1, channels = last ? 3 : geometry_.channels;
    const std::int64_t tall = rows.tile * resolution, wide = columns.tile * resolution;
    const std::int64_t ring = last ? tall : rows.end(), stride = columns.end() * resolution;
    for (std::int64_t i = 0; i < rows.count(); ++i) {
      for (std::int64_t j = 0; j < columns.count(); j += plan_.batch) {
        const std::int64_t places = std::min(plan_.batch, columns.count() - j);
        const std::int64_t batch = std::max(places, up_.manifest.batch[0]);  // the last tile fills up, see Memory
        std::vector<Shape> shapes;
        for (const auto& input : inputs) {
          shapes.push_back({batch, input.channels, rows.tile * input.resolution, columns.tile * input.resolution});
        }
        const auto slots = session.slots(shapes, {batch, channels, tall, wide});
        const Row row{rows.starts[i], memory_.lefts + j};
        for (std::size_t k = 0; k < inputs.size(); ++k) inputs[k].fill(row, batch, slots.inputs[k]);
        machine_.begin.record(stream_);
        session.start();
        machine_.end.record(stream_);
        const std::int64_t span = (columns.starts[j + places - 1] - columns.starts[j]) * resolution + wide;
        launch(Blend{{channels, tall, span},
                     slots.output,
                     places,
                     wide,
                     resolution,
                     row,
                     memory_.across[last ? 0 : 1] + j * wide,
                     memory_.down[last ? 0 : 1] + i * tall,
                     last ? memory_.band : field,
                     ring,
                     stride,
                     memory_.not_finite});
        settle(name, i, j, places);
      }
      if (!last) continue;
      const bool bottom = i + 1 == rows.count();
      const std::int64_t done = bottom ? tall : (rows.starts[i + 1] - rows.starts[i]) * resolution;
      launch(Take{{1, done, stride},
                  memory_.band,
                  rows.starts[i] * resolution,
                  ring,
                  plan_.size.height,
                  plan_.size.width,
                  memory_.picture});
    }
  }

  /// Wait for tiles, look whether they are finite, and report them.
  void settle(const char* name, std::int64_t row, std::int64_t column, std::int64_t places) {
    std::vector<std::int32_t> not_finite(elements(places));
    stream_.download(not_finite.data(), address(memory_.not_finite), not_finite.size() * sizeof(std::int32_t));
    stream_.synchronize();
    *seconds_ += machine_.end.seconds_since(machine_.begin);
    for (std::int64_t k = 0; k < places; ++k) {
      if (not_finite[k] == 0) continue;
      throw_not_finite(up_, plan_, name, {plan_.rows.starts[row], plan_.columns.starts[column + k]});
    }
    step_(places);
  }

  /// From memory_.picture to memory_.result.
  void align(const ImageSpan& out) {
    const std::int64_t height = plan_.size.height, width = plan_.size.width;
    const float unit = static_cast<float>(static_cast<double>(kFull) / static_cast<double>(full_));
    const Extent whole{1, height, width};
    const bool resized = out.size != plan_.size;
    const Output result{memory_.result, out.sample == Sample::u16};
    const Output aligned = resized ? Output{memory_.aligned, true} : result;
    if (request_.color == Color::adain) {
      stream_.zero(address(memory_.sums), 12 * sizeof(std::uint64_t));
      launch(Sums{whole, memory_.picture, memory_.in, unit, memory_.sums});
      launch(AdainTables{{1, 3, kFull + 1}, memory_.sums, static_cast<std::uint64_t>(height * width), memory_.tables});
      launch(Write{whole, memory_.picture, memory_.tables, aligned});
    } else if (request_.color == Color::wavelet) {
      for (std::int64_t first = 0; first < height; first += kLowPassRows) {
        wavelet({first, std::min(first + kLowPassRows, height)}, unit, aligned);
      }
    } else if (!resized) {
      launch(Write{whole, memory_.picture, nullptr, aligned});
    }
    if (resized) launch(Resized{{1, out.size.height, out.size.width}, memory_.out, result});
  }

  void wavelet(Range rows, float unit, const Output& aligned) {
    const std::int64_t width = plan_.size.width;
    const Range halo{std::max<std::int64_t>(rows.first - kHalo, 0), std::min(rows.last + kHalo, plan_.size.height)};
    const Extent planes{3, halo.length(), width};
    float* const* const low = memory_.low;
    launch(Difference{{1, halo.length(), width}, halo.first, memory_.picture, memory_.in, unit, low[0]});
    for (const std::int64_t dilation : {1, 2, 4, 8, 16}) {
      launch(LowPass{planes, low[0], low[1], dilation, 0});
      launch(LowPass{planes, low[1], low[0], 0, dilation});
    }
    launch(AddLow{{1, rows.length(), width}, rows.first, halo.first, halo.length(), low[0], memory_.picture, aligned});
  }

  Machine& machine_;
  const Stream& stream_;
  const Memory& memory_;
  const Upscaler::Impl& up_;
  const Plan& plan_;
  const Geometry& geometry_;
  const Request& request_;
  const float full_;
  const Step& step_;
  double* const seconds_;
};

class CudaAccelerator : public Accelerator {
 public:
  CudaAccelerator(std::shared_ptr<Gpu> gpu, std::unique_ptr<const Kernels> kernels)
      : machine_(std::move(gpu), std::move(kernels)) {}

  bool upscale(const Upscaler::Impl& up, const Plan& plan, const ImageView& in, const ImageSpan& out,
               const Request& request, const Step& step, double* seconds) override {
    const std::lock_guard lock(machine_.gpu->mutex);
    const auto& driver = machine_.gpu->driver;
    driver->activate();
    const std::size_t needed = Memory(Parts(0), up, plan, in, out, request.color).size;
    auto& memory = machine_.memory;
    if (!memory || memory->size() < needed) {
      memory.reset();
      std::size_t free = 0, total = 0;
      driver->check(driver->p_cuMemGetInfo(&free, &total), "cuMemGetInfo");
      if (needed > free / 2) return false;  // the plans need the rest
      try {
        memory.emplace(driver, CudaMemory::device, needed);
      } catch (const NoMemory&) {  // free, but in pieces, or another process was faster
        return false;
      }
    }
    const Trim trim{memory};
    const Memory parts(Parts(memory->address()), up, plan, in, out, request.color);
    const float full = in.sample == Sample::u8 ? 255.0f : 65535.0f;
    CudaRun(machine_, parts, up, plan, request, full, step, seconds).run(in, out);
    return true;
  }

 private:
  /// Gives back what is too much to keep.
  struct Trim {
    std::optional<CudaMemory>& memory;
    ~Trim() {
      if (memory->size() > kKept) memory.reset();
    }
  };

  Machine machine_;
};

}  // namespace

std::shared_ptr<Accelerator> cuda_accelerator(std::shared_ptr<Gpu> gpu) {
  auto kernels = Kernels::load(gpu->driver);
  if (kernels == nullptr) return nullptr;
  return std::make_shared<CudaAccelerator>(std::move(gpu), std::move(kernels));
}

}  // namespace gdpo::detail
