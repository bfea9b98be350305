#include "devices/cuda/device.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "devices/cuda/launch.hpp"
#include "devices/cuda/memory.hpp"
#include "picture/noise.hpp"

namespace gdpo::detail {
namespace {

constexpr std::size_t kStaging = std::size_t{1} << 20;  // half of the pinned memory that pictures pass through
constexpr std::size_t kKept = std::size_t{1} << 30;     // device memory that stays from picture to picture

CUdeviceptr address(const void* device) { return reinterpret_cast<CUdeviceptr>(device); }

/// What stays from picture to picture.
struct Machine {
  Machine(std::shared_ptr<Gpu> on, std::unique_ptr<const Kernels> loaded)
      : gpu(std::move(on)),
        kernels(std::move(loaded)),
        staging(gpu->driver, CudaMemory::pinned, 2 * kStaging),
        quantiles(gpu->driver, CudaMemory::device, sizeof(float) << 16),
        begin(gpu->driver),
        end(gpu->driver),
        arrived{Event(gpu->driver), Event(gpu->driver)} {
    gpu->stream.upload(quantiles.address(), quantile_table(), quantiles.size());
    gpu->stream.synchronize();
  }

  const std::shared_ptr<Gpu> gpu;
  const std::unique_ptr<const Kernels> kernels;
  const CudaMemory staging, quantiles;
  const Event begin, end, arrived[2];  // arrived: in each half of the staging memory
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

/// One picture; holds the GPU's lock.
class CudaDevice : public Device {
 public:
  /// @param memory of the picture, inside machine.memory
  CudaDevice(Machine& machine, std::unique_lock<std::mutex> lock, Memory memory, const Job& job)
      : lock_(std::move(lock)),
        machine_(machine),
        stream_(machine.gpu->stream),
        memory_(std::move(memory)),
        job_(job),
        plan_(job.plan),
        geometry_(job.model.manifest.geometry) {
    const std::int64_t f = geometry_.factor;
    stream_.upload(machine_.memory->address(), memory_.constants.data(), memory_.constants.size());
    stream_.zero(address(memory_.not_finite), elements(most_places(plan_), sizeof(std::int32_t)));
    stream_.zero(address(memory_.band), elements(3, plan_.rows.tile * f, plan_.columns.end() * f, sizeof(float)));
    for (float* const field : memory_.fields) {
      if (!job.model.staged()) continue;
      stream_.zero(address(field), elements(geometry_.channels, plan_.rows.end(), plan_.columns.end(), sizeof(float)));
    }
    pieces(job.in, address(memory_.source), [&](Range pixels, char* staging, CUdeviceptr at, std::size_t bytes) {
      visit(job.in, pixels, staging,
            [](char* to, const char* from, std::int64_t count) { std::memcpy(to, from, count); });
      stream_.upload(at, staging, bytes);
      stream_.synchronize();
    });
  }

  ~CudaDevice() override {
    machine_.gpu->driver->p_cuStreamSynchronize(stream_.get());    // after an error a download may be under way
    if (machine_.memory->size() > kKept) machine_.memory.reset();  // too much to keep
  }

  Slots slots(Session& session, const std::vector<Shape>& inputs, const Shape& output) override {
    return session.on_device()->slots(inputs, output);
  }

  void images(const Tiles& tiles, float* slot) override {
    const std::int64_t f = geometry_.factor;
    const Extent extent{tiles.batch, plan_.rows.tile * f, plan_.columns.tile * f};
    launch(Images{extent, memory_.in, 2.0f / job_.full(), f, row(tiles), slot});
  }

  void noise(const Tiles& tiles, float* slot) override {
    const std::int64_t channels = geometry_.channels;
    const Extent extent{tiles.batch * ceil_div(channels, 8), plan_.rows.tile, plan_.columns.tile};
    launch(Noises{extent, job_.request.seed, machine_.quantiles.data<float>(), channels, row(tiles), slot});
  }

  void cut(Target field, const Tiles& tiles, float* slot) override {
    const std::int64_t channels = geometry_.channels;
    const Extent extent{tiles.batch * channels, plan_.rows.tile, plan_.columns.tile};
    const float* const from = memory_.fields[static_cast<int>(field)];
    launch(Cut{extent, from, channels, plan_.rows.end(), plan_.columns.end(), row(tiles), slot});
  }

  void run(Session& session) override {
    machine_.begin.record(stream_);
    session.on_device()->start();
    machine_.end.record(stream_);
  }

  void blend(Target target, const Tiles& tiles, const float* output) override {
    const auto& starts = plan_.columns.starts;
    const bool picture = target == Target::picture;
    const std::int64_t f = picture ? geometry_.factor : 1, channels = picture ? 3 : geometry_.channels;
    const std::int64_t tall = plan_.rows.tile * f, wide = plan_.columns.tile * f;
    const std::int64_t span = (starts[tiles.column + tiles.count - 1] - starts[tiles.column]) * f + wide;
    const int weights = picture ? 0 : 1;
    launch(Blend{{channels, tall, span},
                 output,
                 tiles.count,
                 wide,
                 f,
                 row(tiles),
                 memory_.across[weights] + tiles.column * wide,
                 memory_.down[weights] + tiles.row * tall,
                 picture ? memory_.band : memory_.fields[static_cast<int>(target)],
                 picture ? tall : plan_.rows.end(),
                 plan_.columns.end() * f,
                 memory_.not_finite});
  }

  Outcome settle(const Tiles& tiles) override {
    std::vector<std::int32_t> not_finite(elements(tiles.count));
    stream_.download(not_finite.data(), address(memory_.not_finite), not_finite.size() * sizeof(std::int32_t));
    stream_.synchronize();
    const auto bad = std::find_if(not_finite.begin(), not_finite.end(), [](std::int32_t flag) { return flag != 0; });
    return {bad == not_finite.end() ? -1 : bad - not_finite.begin(), machine_.end.seconds_since(machine_.begin)};
  }

  /// The picture stays on the device until it is whole.
  void take(Range rows) override {
    const std::int64_t f = geometry_.factor, height = plan_.size.height;
    launch(Take{{1, rows.length(), plan_.columns.end() * f},
                memory_.band,
                rows.first,
                plan_.rows.tile * f,
                height,
                plan_.size.width,
                memory_.picture});
    if (rows.last < height) return;
    align();
    download();
  }

 private:
  /// memory_.result to the caller, band by band: one half of the staging memory fills while the other is emptied.
  void download() {
    struct Piece {
      Range rows, pixels;  // a band, and what of it
    };
    const std::int64_t width = job_.out.size.width, height = job_.out.size.height;
    const std::int64_t pixel = 3 * job_.in.sample_bytes(), fits = static_cast<std::int64_t>(kStaging) / pixel;
    const std::int64_t most = std::max<std::int64_t>(fits / width, 1);
    std::vector<Piece> pieces;
    for (std::int64_t row = 0; row < height; row += most) {
      const Range rows{row, std::min(row + most, height)};
      const std::int64_t all = rows.length() * width;
      for (std::int64_t first = 0; first < all; first += fits)
        pieces.push_back({rows, {first, std::min(first + fits, all)}});
    }
    const auto half = [&](std::size_t i) { return machine_.staging.data<char>() + i % 2 * kStaging; };
    const auto fetch = [&](std::size_t i) {
      if (i >= pieces.size()) return;
      const auto& [rows, pixels] = pieces[i];
      const std::int64_t at = (rows.first * width + pixels.first) * pixel;
      stream_.download(half(i), address(memory_.result) + static_cast<CUdeviceptr>(at),
                       elements(pixels.length(), pixel));
      machine_.arrived[i % 2].record(stream_);
    };
    fetch(0);
    ImageSpan out;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      fetch(i + 1);
      machine_.arrived[i % 2].synchronize();
      const auto& [rows, pixels] = pieces[i];
      if (pixels.first == 0) out = job_.out.rows(rows);
      visit(out, pixels, half(i), [](const char* from, char* to, std::int64_t count) { std::memcpy(to, from, count); });
      if (pixels.last == rows.length() * width) job_.out.done(rows);
    }
  }

  Row row(const Tiles& tiles) const { return {plan_.rows.starts[tiles.row], memory_.lefts + tiles.column}; }

  /// Call move(pixels, staging memory, where on the device, bytes) for all of a picture, a piece at a time.
  template <typename Image, typename Move>
  void pieces(const Image& image, CUdeviceptr at, const Move& move) {
    const std::int64_t pixel = 3 * image.sample_bytes(), most = static_cast<std::int64_t>(kStaging) / pixel;
    const std::int64_t all = image.size.height * image.size.width;
    for (std::int64_t first = 0; first < all; first += most) {
      const Range pixels{first, std::min(first + most, all)};
      move(pixels, machine_.staging.data<char>(), at + static_cast<CUdeviceptr>(first * pixel),
           elements(pixels.length(), pixel));
    }
  }

  template <typename Kernel>
  void launch(const Kernel& kernel) {
    machine_.kernels->launch(stream_, kernel);
  }

  /// From memory_.picture to memory_.result.
  void align() {
    const std::int64_t height = plan_.size.height, width = plan_.size.width;
    const float unit = static_cast<float>(static_cast<double>(kFull) / static_cast<double>(job_.full()));
    const Extent whole{1, height, width};
    const bool resized = job_.resized();
    const Output result{memory_.result, job_.out.sample == Sample::u16};
    const Output aligned = resized ? Output{memory_.aligned, true} : result;
    if (job_.request.color == Color::adain) {
      stream_.zero(address(memory_.sums), 12 * sizeof(std::uint64_t));
      launch(Sums{whole, memory_.picture, memory_.in, unit, memory_.sums});
      launch(AdainTables{{1, 3, kFull + 1}, memory_.sums, static_cast<std::uint64_t>(height * width), memory_.tables});
      launch(Write{whole, memory_.picture, memory_.tables, aligned});
    } else if (job_.request.color == Color::wavelet) {
      for (std::int64_t first = 0; first < height; first += kLowPassRows) {
        wavelet({first, std::min(first + kLowPassRows, height)}, unit, aligned);
      }
    } else if (!resized) {
      launch(Write{whole, memory_.picture, nullptr, aligned});
    }
    if (resized) launch(Resized{{1, job_.out.size.height, job_.out.size.width}, memory_.out, result});
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
    launch(AddLow{{1, rows.length(), width},
                  rows.first,
                  halo.first,
                  halo.length(),
                  memory_.in,
                  low[0],
                  memory_.picture,
                  aligned});
  }

  const std::unique_lock<std::mutex> lock_;
  Machine& machine_;
  const Stream& stream_;
  const Memory memory_;
  const Job& job_;
  const Plan& plan_;
  const Geometry& geometry_;
};

class CudaAccelerator : public Accelerator {
 public:
  CudaAccelerator(std::shared_ptr<Gpu> gpu, std::unique_ptr<const Kernels> kernels)
      : machine_(std::move(gpu), std::move(kernels)) {}

  std::unique_ptr<Device> device(const Job& job) override {
    std::unique_lock lock(machine_.gpu->mutex);
    const auto& driver = machine_.gpu->driver;
    driver->activate();
    const std::size_t needed = Memory(Parts(0), job).size;
    auto& memory = machine_.memory;
    if (!memory || memory->size() < needed) {
      memory.reset();
      std::size_t free = 0, total = 0;
      driver->check(driver->p_cuMemGetInfo(&free, &total), "cuMemGetInfo");
      if (needed > free / 2) return nullptr;  // the plans need the rest
      try {
        memory.emplace(driver, CudaMemory::device, needed);
      } catch (const NoMemory&) {  // free, but in pieces, or another process was faster
        return nullptr;
      }
    }
    return std::make_unique<CudaDevice>(machine_, std::move(lock), Memory(Parts(memory->address()), job), job);
  }

 private:
  Machine machine_;
};

}  // namespace

std::shared_ptr<Accelerator> cuda_accelerator(std::shared_ptr<Gpu> gpu) {
  auto kernels = Kernels::load(gpu->driver);
  if (kernels == nullptr) return nullptr;
  return std::make_shared<CudaAccelerator>(std::move(gpu), std::move(kernels));
}

}  // namespace gdpo::detail
