#include "api/upscaler.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "api/views.hpp"
#include "picture/align.hpp"
#include "picture/restore.hpp"

#ifndef GDPO_VERSION
#error "GDPO_VERSION must be the project's version"
#endif

namespace gdpo {

using detail::text;

namespace {

constexpr double kMaxOutputPixels = 1e9;

int threads_of(const Options& options) {
  if (options.threads < 0 || options.threads > 4096) {
    throw InvalidArgument(text("threads must be 0 to 4096; got ", options.threads));
  }
  return options.threads == 0 ? detail::usable_cores() : options.threads;
}

float largest(Sample sample) { return sample == Sample::u8 ? 255.0f : 65535.0f; }

}  // namespace

Upscaler::Impl::Impl(detail::Manifest manifest, Sessions sessions, std::string backend, std::string version,
                     const Options& options, std::shared_ptr<detail::Accelerator> accelerator)
    : manifest(std::move(manifest)),
      sessions(std::move(sessions)),
      backend(std::move(backend)),
      version(std::move(version)),
      accelerator(std::move(accelerator)),
      pool(threads_of(options)),
      places_(options.concurrency > 0 ? options.concurrency : threads_of(options)) {}

Upscaler::Impl::Turn::Turn(const Impl& impl) : impl_(impl) {
  std::unique_lock lock(impl_.mutex_);
  impl_.free_.wait(lock, [this] { return impl_.places_ > 0; });
  --impl_.places_;
}

Upscaler::Impl::Turn::~Turn() {
  {
    const std::lock_guard lock(impl_.mutex_);
    ++impl_.places_;
  }
  impl_.free_.notify_one();
}

Upscaler Upscaler::load(const std::string& folder, const Options& options) {
  threads_of(options);  // before anything is read
  detail::Manifest manifest = detail::load_manifest(folder);
  const std::string backend = options.backend == "auto" ? manifest.backend : options.backend;
  if (backend != "onnx" && backend != "onnxruntime" && backend != "tensorrt" && backend != "tensorrt-rtx") {
    throw InvalidArgument("backend must be auto, onnx, onnxruntime, tensorrt or tensorrt-rtx; got '" + backend + "'");
  }
  const bool portable = manifest.backend == "onnx" && backend == "onnxruntime";
  if (backend != manifest.backend && !portable) {
    throw FolderError(text(folder, " is for ", manifest.backend, ", not ", backend,
                           "; build it: python -m engine.build ", manifest.backend == "onnx" ? folder : "ONNX_FOLDER",
                           " --backend ", backend, " --out DIR"));
  }
  if (backend == "tensorrt-rtx") {
    throw BackendError(
        "plans of TensorRT-RTX run from Python only; build this folder for tensorrt or onnxruntime to use it from C++");
  }
  const auto found = backend == "tensorrt" ? detail::tensorrt_backend(options) : detail::onnxruntime_backend(options);
  Impl::Sessions sessions;
  for (const auto& [name, graph] : manifest.graphs) sessions[name] = found->open(manifest, folder, name);
  const std::string version = found->version();
  return Impl::wrap(std::make_shared<const Impl>(std::move(manifest), std::move(sessions), backend, version, options,
                                                 found->accelerator()));
}

void Upscaler::upscale(const ImageView& in, const ImageSpan& out, const Request& request) const {
  upscale(std::vector{in}, std::vector{out}, request);
}

void Upscaler::upscale(const std::vector<ImageView>& in, const std::vector<ImageSpan>& out,
                       const Request& request) const {
  if (in.size() != out.size()) {
    throw InvalidArgument(text("in and out must be as many pictures; got ", in.size(), " and ", out.size()));
  }
  if (request.color != Color::adain && request.color != Color::wavelet && request.color != Color::none) {
    throw InvalidArgument(text("color must be adain, wavelet or none; got ", static_cast<int>(request.color)));
  }
  const Impl::Turn turn(*impl_);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<detail::Plan> plans;
  std::int64_t done = 0, total = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    detail::check_input(in[i]);
    detail::check_output(out[i], in[i], output_size(in[i].size, request.scale));
    plans.emplace_back(impl_->manifest, in[i].size, request);
    total += plans.back().calls;
  }
  const detail::Step step = [&](std::int64_t tiles) {
    done += tiles;
    if (request.progress && !request.progress(done, total))
      throw Cancelled(text("cancelled after ", done, " of ", total, " tiles"));
  };
  double backend = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const auto& gpu = impl_->accelerator;
    if (gpu != nullptr && gpu->upscale(*impl_, plans[i], in[i], out[i], request, step, &backend)) continue;
    const detail::Resampler resampler(in[i], plans[i].size);
    const float full = largest(in[i].sample);
    auto picture = detail::restore(*impl_, plans[i], resampler, full, request, step, &backend);
    detail::finish(picture, resampler, full, request.color, impl_->pool, out[i]);
  }
  if (request.timing != nullptr) {
    request.timing->total = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    request.timing->backend = backend;
  }
}

const std::string& Upscaler::backend() const noexcept { return impl_->backend; }
const std::string& Upscaler::backend_version() const noexcept { return impl_->version; }

Size output_size(Size in, double scale) {
  if (!(scale >= 0.05 && scale <= 64)) throw InvalidArgument(text("scale must be between 0.05 and 64; got ", scale));
  if (in.height < 1 || in.width < 1) {
    throw InvalidArgument(text("a picture must be at least 1x1; got ", in.height, "x", in.width));
  }
  const auto h = static_cast<double>(in.height), w = static_cast<double>(in.width);
  // Halves to even, as Python's round.
  const double height = std::max(std::nearbyint(h * scale), 1.0), width = std::max(std::nearbyint(w * scale), 1.0);
  const double pixels = std::max(height * width, 16 * h * w);
  if (pixels > kMaxOutputPixels) {
    throw InvalidArgument(
        text(in.width, "x", in.height, " upscaled is ", std::nearbyint(pixels / 1e6), " megapixels; at most 1000 fit"));
  }
  return {static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)};
}

const char* version() noexcept { return GDPO_VERSION; }

}  // namespace gdpo
