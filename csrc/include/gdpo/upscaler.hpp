/// Upscale pictures with an engine folder, in C++: the same bytes as Python's engine.Upscaler.
///
///     auto up = gdpo::Upscaler::load("engine");
///     up.upscale(gdpo::ImageView::packed(rgb, {height, width}), gdpo::ImageSpan::packed(out, {4 * height, 4 *
///     width}));
#pragma once

#include <cstdint>
#include <functional>
#include <gdpo/error.hpp>
#include <gdpo/export.hpp>
#include <gdpo/image.hpp>
#include <memory>
#include <string>
#include <vector>

namespace gdpo {

/// How to load a folder.
struct Options {
  std::string backend = "auto";  ///< what the folder was built for; or "onnx", "onnxruntime", "tensorrt"
  std::string device;            ///< "cpu", "cuda", "cuda:N"; empty lets the backend choose
  int threads = 0;               ///< of the CPU; 0 takes every core that this process may use
  bool trust_plan = false;       ///< load a TensorRT plan (executable code) that this user did not build
  /// The backend's shared library. Empty: $GDPO_ONNXRUNTIME (or $GDPO_TENSORRT), then the loader's own search.
  std::string library;
  /// Pictures worked on at once, over all threads; more calls wait. It bounds memory. 0: as many as `threads`.
  int concurrency = 0;
};

/// Colours are aligned to those of the input: mean and deviation (AdaIN, the paper's), low frequencies (wavelet), or
/// not at all. Only the wavelet keeps flat areas as they are. An input with R = G = B everywhere stays neutral in any
/// case.
enum class Color { adain, wavelet, none };

/// Seconds of one call, over all of its pictures.
struct Timing {
  double total = 0, backend = 0;
};

/// How to upscale.
struct Request {
  std::uint64_t seed = 0;  ///< the same seed, picture and tile give the same result
  int tile = 0;            ///< longest side of a tile in INPUT pixels; 0 lets the model's profile choose
  double scale = 4;        ///< of the result; the model makes x4, other factors resize that
  Color color = Color::wavelet;
  int batch = 0;                         ///< tiles handed to the backend at once; 0 takes the profile's usual batch
  std::int64_t max_pixels = kMaxPixels;  ///< of the result and of the model's x4; more is refused
  /// Called on the calling thread with (tiles done, tiles in all); false cancels. What it throws passes through. It
  /// must not call `upscale` of the same object, which may be waiting for this picture to end.
  std::function<bool(std::int64_t, std::int64_t)> progress;
  Timing* timing = nullptr;  ///< filled where given
};

/// Takes finished rows of a result, [rows, W, 3] of 8 or 16 bit as the input's, from the top to the bottom, on the
/// thread that called `upscale`. They are valid during the call. What it throws ends the picture and passes through. As
/// `progress`, it must not call `upscale` of the same object.
using BandSink = std::function<void(std::int64_t first, const ImageView& rows)>;

/// A loaded engine folder: a handle that copies cheaply. Any number of threads may call `upscale` on one object.
class GDPO_API Upscaler {
 public:
  /// Load an engine folder, as engine.export or engine.build wrote it. Every file's SHA-256 is compared with the
  /// manifest's before the backend sees it.
  /// @throws FolderError, BackendError, InvalidArgument
  static Upscaler load(const std::string& folder, const Options& options = {});

  /// Upscale one picture.
  /// @param in  [H,W,3] of 8 or 16 bit
  /// @param out output_size(in.size, request.scale) of the same samples; must not overlap `in`. Its contents are
  ///            undefined where an exception is thrown.
  /// @throws InvalidArgument, NotFinite, Cancelled, BackendError, std::bad_alloc
  void upscale(const ImageView& in, const ImageSpan& out, const Request& request = {}) const;

  /// Upscale one picture whose result need not be in memory whole: `sink` gets its rows as they are finished. The bytes
  /// are the same. With Color::adain the model's x4 is kept in memory until its statistics are known.
  void upscale(const ImageView& in, const BandSink& sink, const Request& request = {}) const;

  /// Upscale several pictures of any sizes; each result is what a call of its own gives. Progress counts all tiles.
  void upscale(const std::vector<ImageView>& in, const std::vector<ImageSpan>& out, const Request& request = {}) const;

  const std::string& backend() const noexcept;          ///< that runs it: "onnx", "onnxruntime" or "tensorrt"
  const std::string& backend_version() const noexcept;  ///< of the library that was found

  struct Impl;

 private:
  explicit Upscaler(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

/// The size of a result.
/// @throws InvalidArgument: a scale that is not in [0.05, 64], an empty picture, more pixels than `max_pixels`
GDPO_API Size output_size(Size in, double scale = 4, std::int64_t max_pixels = kMaxPixels);

/// Of this library.
GDPO_API const char* version() noexcept;

}  // namespace gdpo
