/// engine._core: the C++ upscaler for Python, and the pieces that tests compare with Python's.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <gdpo/upscaler.hpp>
#include <limits>
#include <optional>
#include <tuple>

#include "arrays.hpp"
#include "folder/sha256.hpp"
#include "picture/noise.hpp"
#include "picture/resample.hpp"
#include "picture/tiles.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace gdpo::python {
namespace {

using detail::Pool;
using detail::Range;
using detail::text;
using Ends = std::pair<std::int64_t, std::int64_t>;

Color color_of(const std::string& name) {
  if (name == "adain") return Color::adain;
  if (name == "wavelet") return Color::wavelet;
  if (name == "none") return Color::none;
  throw py::value_error("color must be one of adain, wavelet, none; got '" + name + "'");
}

/// Python's integers are larger; what does not fit is refused by the library as too large.
int clamped(std::int64_t value) {
  return static_cast<int>(
      std::clamp<std::int64_t>(value, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()));
}

py::object blank(Size size, Sample sample) {
  const std::vector<py::ssize_t> shape = {size.height, size.width, 3};
  if (sample == Sample::u8) return py::array_t<std::uint8_t>(shape);
  return py::array_t<std::uint16_t>(shape);
}

Upscaler load(const std::string& folder, const std::string& backend, const std::optional<std::string>& device,
              int threads, bool trust_plan, const std::optional<std::string>& library, int concurrency) {
  Options options;
  options.backend = backend;
  options.device = device.value_or("");
  options.threads = threads;
  options.trust_plan = trust_plan;
  options.library = library.value_or("");
  options.concurrency = concurrency;
  const py::gil_scoped_release released;
  return Upscaler::load(folder, options);
}

py::object upscale(const Upscaler& up, const py::object& image, const py::object& out, std::uint64_t seed,
                   std::int64_t tile, double scale, const std::string& color, std::int64_t batch,
                   const py::object& progress, const py::object& timing, const py::object& sink,
                   std::int64_t max_pixels) {
  const Borrowed in(image, "image", false);
  const ImageView view = in.view();
  if (!sink.is_none() && !out.is_none()) throw py::value_error("out and sink exclude each other");
  py::object result = out;
  std::optional<Borrowed> target;
  if (sink.is_none()) {
    if (out.is_none()) result = blank(output_size(view.size, scale, max_pixels), view.sample);
    target.emplace(result, "out", true);
  }
  Request request;
  request.max_pixels = max_pixels;
  request.seed = seed;
  request.tile = clamped(tile);
  request.scale = scale;
  request.color = color_of(color);
  request.batch = clamped(batch);
  Timing seconds;
  request.timing = &seconds;
  request.progress = [&progress](std::int64_t done, std::int64_t total) {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C, between two tiles
    if (!progress.is_none()) progress(done, total);
    return true;
  };
  const BandSink hand_on = [&sink](std::int64_t first, const ImageView& rows) {
    const py::gil_scoped_acquire held;
    const py::object band = blank(rows.size, rows.sample);
    const Borrowed copy(band, "band", true);
    std::copy_n(static_cast<const char*>(rows.data), rows.bytes, static_cast<char*>(copy.span().data));
    sink(first, band);
  };
  {
    const py::gil_scoped_release released;
    if (target) {
      up.upscale(view, target->span(), request);
    } else {
      up.upscale(view, hand_on, request);
    }
  }
  if (!timing.is_none()) {
    timing["total"] = seconds.total;
    timing["backend"] = seconds.backend;
  }
  return result;
}

py::array_t<float> noise_field(std::uint64_t seed, int channels, Ends rows, Ends columns) {
  const Range down{rows.first, rows.second}, across{columns.first, columns.second};
  py::array_t<float> result({static_cast<py::ssize_t>(std::max(channels, 0)),
                             static_cast<py::ssize_t>(std::max<std::int64_t>(down.length(), 0)),
                             static_cast<py::ssize_t>(std::max<std::int64_t>(across.length(), 0))});
  Pool pool(2);
  detail::noise_field(seed, channels, down, across, result.mutable_data(), pool);
  return result;
}

py::array_t<float> resize_window(const py::object& pixels, Ends size, Ends rows, Ends columns) {
  const Borrowed in(pixels, "pixels", false);
  const Range down{rows.first, rows.second}, across{columns.first, columns.second};
  const detail::Resampler resampler(in.view(), {size.first, size.second});
  py::array_t<float> result(
      {py::ssize_t{3}, static_cast<py::ssize_t>(down.length()), static_cast<py::ssize_t>(across.length())});
  float* const out = result.mutable_data();
  Pool pool(2);
  resampler.window(down, across, pool, [&](std::int64_t first, std::int64_t count, const float* planes) {
    for (std::int64_t c = 0; c < 3; ++c) {
      std::copy_n(planes + c * count * across.length(), count * across.length(),
                  out + (c * down.length() + first) * across.length());
    }
  });
  return result;
}

std::tuple<std::vector<std::int64_t>, std::int64_t, py::array_t<float>> cover(std::int64_t size, std::int64_t tile,
                                                                              std::int64_t overlap,
                                                                              std::int64_t multiple, bool fixed,
                                                                              std::int64_t resolution) {
  const detail::Axis axis = detail::cover(size, tile, overlap, multiple, fixed);
  const auto weights = axis.weights(resolution);
  py::array_t<float> result({static_cast<py::ssize_t>(axis.count()), static_cast<py::ssize_t>(axis.tile * resolution)});
  std::copy(weights.begin(), weights.end(), result.mutable_data());
  return {axis.starts, axis.tile, result};
}

/// A path or a name in a message need not be UTF-8.
void raise(PyObject* type, const char* message) {
  const py::object words = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(message, static_cast<py::ssize_t>(std::strlen(message)), "backslashreplace"));
  PyErr_SetObject(type, words.ptr());
}

/// Exceptions of the library become those that Python's engine raises for the same reason.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidArgument& error) {
    raise(PyExc_ValueError, error.what());
  } catch (const FolderError& error) {
    const py::object type = py::module_::import("engine.runtime.manifest").attr("FolderError");
    raise(type.ptr(), error.what());
  } catch (const NotFinite& error) {
    raise(PyExc_FloatingPointError, error.what());
  } catch (const Error& error) {
    raise(PyExc_RuntimeError, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ upscaler.";
  m.attr("__version__") = version();
  py::register_exception_translator(translate);
  py::class_<Upscaler>(m, "Upscaler")
      .def(py::init(&load), "folder"_a, py::kw_only(), "backend"_a = "auto", "device"_a = py::none(), "threads"_a = 0,
           "trust_plan"_a = false, "library"_a = py::none(), "concurrency"_a = 0)
      .def("upscale", &upscale, "image"_a, "out"_a = py::none(), py::kw_only(), "seed"_a = 0, "tile"_a = 0,
           "scale"_a = 4.0, "color"_a = "wavelet", "batch"_a = 0, "progress"_a = py::none(), "timing"_a = py::none(),
           "sink"_a = py::none(), "max_pixels"_a = kMaxPixels)
      .def_property_readonly("backend", &Upscaler::backend)
      .def_property_readonly("backend_version", &Upscaler::backend_version);
  m.def(
      "philox", [](std::array<std::uint32_t, 4> counter, std::uint64_t seed) { return detail::philox(counter, seed); },
      "counter"_a, "seed"_a);
  m.def("noise_field", &noise_field, "seed"_a, "channels"_a, "rows"_a, "columns"_a);
  m.def("resize_window", &resize_window, "pixels"_a, "size"_a, "rows"_a, "columns"_a);
  m.def("cover", &cover, "size"_a, "tile"_a, "overlap"_a, "multiple"_a, py::kw_only(), "fixed"_a = false,
        "resolution"_a = 1);
  m.def("sha256", [](const py::bytes& data) {
    const auto view = static_cast<std::string_view>(data);
    return std::pair(detail::sha256(view.data(), view.size()), detail::sha256_portable(view.data(), view.size()));
  });
}

}  // namespace gdpo::python
