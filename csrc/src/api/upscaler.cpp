#include "api/upscaler.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "api/views.hpp"
#include "backends/registry.hpp"
#include "devices/cpu/device.hpp"

#ifndef GDPO_VERSION
#error "GDPO_VERSION must be the project's version"
#endif

namespace gdpo {

using detail::text;

namespace {

int threads_of(const Options& options) {
  if (options.threads < 0 || options.threads > 4096) {
    throw InvalidArgument(text("threads must be 0 to 4096; got ", options.threads));
  }
  return options.threads == 0 ? detail::usable_cores() : options.threads;
}

void check_request(const Request& request) {
  if (request.color != Color::adain && request.color != Color::wavelet && request.color != Color::none) {
    throw InvalidArgument(text("color must be adain, wavelet or none; got ", static_cast<int>(request.color)));
  }
}

/// One least tile: a graph of any size that does not fit the manifest fails now and not in the middle of a picture.
void try_out(const Upscaler& up, const std::string& folder) {
  const std::uint8_t in[3] = {};
  std::uint8_t out[3] = {};
  Request request;
  request.scale = 1;
  try {
    up.upscale(ImageView::packed(in, {1, 1}), ImageSpan::packed(out, {1, 1}), request);
  } catch (const NotFinite&) {  // a matter of this picture and of the precision
  } catch (const BackendError& error) {
    throw FolderError(text(folder, ": its graphs do not fit its manifest (", error.what(), ")"));
  }
}

}  // namespace

Upscaler::Impl::Impl(detail::Model model, std::string backend, std::string version, const Options& options,
                     std::shared_ptr<detail::Accelerator> accelerator)
    : model(std::move(model)),
      backend(std::move(backend)),
      version(std::move(version)),
      accelerator(std::move(accelerator)),
      pool(threads_of(options)),
      process(getpid()),
      places_(options.concurrency > 0 ? options.concurrency : threads_of(options)) {}

Upscaler Upscaler::Impl::wrap(std::shared_ptr<const Impl> impl) {
  const Impl* const address = impl.get();
  const auto owner = new std::shared_ptr<const Impl>(std::move(impl));
  return Upscaler(std::shared_ptr<const Impl>(address, [owner](const Impl* ours) {
    if (ours->process == getpid()) delete owner;  // in a child the end would wait for threads that are not there
  }));
}

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
  detail::Model model{detail::load_manifest(folder), {}};
  const detail::Manifest& manifest = model.manifest;
  const std::string name = options.backend == "auto" ? manifest.backend : options.backend;
  const auto* const backend = detail::find_backend(name);
  if (backend == nullptr) {
    throw InvalidArgument("backend must be auto or one of " + detail::backend_names() + "; got '" + name + "'");
  }
  if (!backend->can_run(manifest.backend)) {
    throw FolderError(text(folder, " is for ", manifest.backend, ", not ", name, "; build it: python -m engine.build ",
                           manifest.backend == "onnx" ? folder : "ONNX_FOLDER", " --backend ", name, " --out DIR"));
  }
  const auto found = backend->open(options);
  for (const auto& [graph, entry] : manifest.graphs) {
    if (!backend->is_plan || options.trust_plan || detail::built_here(entry.sha256)) continue;
    throw FolderError(text(folder, "/", entry.file,
                           ": a plan is executable code and this one was not built by you here; build it (python -m "
                           "engine.build) or, if you trust its source, set Options::trust_plan"));
  }
  for (const auto& [graph, entry] : manifest.graphs) model.sessions[graph] = found->open(manifest, folder, graph);
  const bool dynamic = !backend->is_plan && !manifest.fixed();  // of a static one every side was compared
  const auto up =
      Impl::wrap(std::make_shared<const Impl>(std::move(model), name, found->version(), options, found->accelerator()));
  if (dynamic) try_out(up, folder);
  return up;
}

void Upscaler::upscale(const ImageView& in, const ImageSpan& out, const Request& request) const {
  upscale(std::vector{in}, std::vector{out}, request);
}

void Upscaler::upscale(const std::vector<ImageView>& in, const std::vector<ImageSpan>& out,
                       const Request& request) const {
  if (in.size() != out.size()) {
    throw InvalidArgument(text("in and out must be as many pictures; got ", in.size(), " and ", out.size()));
  }
  check_request(request);
  std::vector<detail::Destination> destinations;
  for (std::size_t i = 0; i < in.size(); ++i) {
    detail::check_input(in[i]);
    detail::check_output(out[i], in[i], output_size(in[i].size, request.scale, request.max_pixels));
    destinations.emplace_back(out[i]);
  }
  impl_->run(in, std::move(destinations), request);
}

void Upscaler::upscale(const ImageView& in, const BandSink& sink, const Request& request) const {
  if (!sink) throw InvalidArgument("sink must be a function");
  check_request(request);
  detail::check_input(in);
  std::vector<detail::Destination> destination;
  destination.emplace_back(output_size(in.size, request.scale, request.max_pixels), in.sample, sink);
  impl_->run({in}, std::move(destination), request);
}

void Upscaler::Impl::run(const std::vector<ImageView>& in, std::vector<detail::Destination> out,
                         const Request& request) const {
  if (process != getpid()) {
    throw BackendError("loaded before this process was forked, and a fork takes no threads along; load it here again");
  }
  const Turn turn(*this);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<detail::Plan> plans;
  std::int64_t done = 0, total = 0;
  for (const auto& image : in) {
    plans.emplace_back(model.manifest, image.size, request);
    total += plans.back().calls;
  }
  const detail::Step step = [&](std::int64_t tiles) {
    done += tiles;
    if (request.progress && !request.progress(done, total))
      throw Cancelled(text("cancelled after ", done, " of ", total, " tiles"));
  };
  double seconds = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    if (detail::is_neutral(in[i])) out[i].keep_neutral();
    const detail::Job job{model, plans[i], request, in[i], out[i]};
    std::unique_ptr<detail::Device> device;
    if (accelerator != nullptr) device = accelerator->device(job);
    if (device == nullptr) device = std::make_unique<detail::CpuDevice>(job, pool);
    detail::restore(job, *device, step, &seconds);
  }
  if (request.timing != nullptr) {
    request.timing->total = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    request.timing->backend = seconds;
  }
}

const std::string& Upscaler::backend() const noexcept { return impl_->backend; }
const std::string& Upscaler::backend_version() const noexcept { return impl_->version; }

Size output_size(Size in, double scale, std::int64_t max_pixels) {
  if (!(scale >= 0.05 && scale <= 64)) throw InvalidArgument(text("scale must be between 0.05 and 64; got ", scale));
  if (in.height < 1 || in.width < 1) {
    throw InvalidArgument(text("a picture must be at least 1x1; got ", in.height, "x", in.width));
  }
  const auto h = static_cast<double>(in.height), w = static_cast<double>(in.width);
  // Halves to even, as Python's round.
  const double height = std::max(std::nearbyint(h * scale), 1.0), width = std::max(std::nearbyint(w * scale), 1.0);
  const double pixels = std::max(height * width, 16 * h * w);
  if (pixels > static_cast<double>(max_pixels)) {
    throw InvalidArgument(text(in.width, "x", in.height, " upscaled is ", std::nearbyint(pixels / 1e6),
                               " megapixels; at most ", std::nearbyint(static_cast<double>(max_pixels) / 1e6), " fit"));
  }
  return {static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)};
}

const char* version() noexcept { return GDPO_VERSION; }

}  // namespace gdpo
