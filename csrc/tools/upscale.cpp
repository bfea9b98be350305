/// gdpo-upscale-cpp: upscale one picture from the command line, without Python.
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <gdpo/pnm.hpp>
#include <gdpo/upscaler.hpp>
#include <iostream>
#include <string>
#include <system_error>
#include <vector>

#ifdef GDPO_PNG
#include "png.hpp"
#endif

namespace {

constexpr const char* kUsage =
    "usage: gdpo-upscale-cpp FOLDER IN OUT [--seed N] [--tile N] [--scale X] [--color wavelet|adain|none]\n"
    "                        [--threads N] [--device cpu|cuda|cuda:N] [--trust-plan] [--no-progress]\n"
    "FOLDER was written by engine.export or engine.build; pictures are PPM (8 and 16 bit)"
#ifdef GDPO_PNG
    " or PNG"
#endif
    ".\nONNX Runtime is found through GDPO_ONNXRUNTIME or the loader's search path.\n";

bool ends_with(const std::string& name, const char* suffix) {
  const std::size_t length = std::strlen(suffix);
  return name.size() >= length && name.compare(name.size() - length, length, suffix) == 0;
}

/// A reader and a writer for the path's suffix.
struct Codec {
  gdpo::Picture (*read)(const std::string&, std::int64_t);
  void (*write)(const std::string&, const gdpo::Picture&);
};

Codec codec(const std::string& path) {
  if (ends_with(path, ".ppm")) return {gdpo::read_ppm, gdpo::write_ppm};
#ifdef GDPO_PNG
  if (ends_with(path, ".png")) return {gdpo::read_png, gdpo::write_png};
#endif
  throw gdpo::InvalidArgument(path + ": unknown kind of picture; see --help");
}

struct Arguments {
  std::vector<std::string> paths;
  gdpo::Options options;
  gdpo::Request request;
  bool progress = true;
};

template <typename T, typename Convert>
T number(const std::string& name, const std::string& value, Convert convert) {
  char* end = nullptr;
  errno = 0;
  const T result = static_cast<T>(convert(value.c_str(), &end));
  if (value.empty() || *end != 0 || errno != 0 || (value[0] == '-' && name == "--seed")) {
    throw gdpo::InvalidArgument(name + " needs a number; got '" + value + "'");
  }
  return result;
}

Arguments parse(int count, char** values) {
  Arguments result;
  const auto integer = [](const char* s, char** end) { return std::strtol(s, end, 10); };
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    if (name.rfind("--", 0) != 0) {
      result.paths.push_back(name);
      continue;
    }
    if (name == "--trust-plan" || name == "--no-progress") {
      (name == "--trust-plan" ? result.options.trust_plan : result.progress) = name == "--trust-plan";
      continue;
    }
    if (i + 1 == count) throw gdpo::InvalidArgument(name + " is unknown or needs a value (see --help)");
    const std::string value = values[++i];
    if (name == "--seed") {
      result.request.seed =
          number<std::uint64_t>(name, value, [](const char* s, char** e) { return std::strtoull(s, e, 10); });
    } else if (name == "--tile") {
      result.request.tile = number<int>(name, value, integer);
    } else if (name == "--scale") {
      result.request.scale = number<double>(name, value, std::strtod);
    } else if (name == "--threads") {
      result.options.threads = number<int>(name, value, integer);
    } else if (name == "--device") {
      result.options.device = value;
    } else if (name == "--color" && (value == "adain" || value == "wavelet" || value == "none")) {
      result.request.color = value == "adain"     ? gdpo::Color::adain
                             : value == "wavelet" ? gdpo::Color::wavelet
                                                  : gdpo::Color::none;
    } else {
      throw gdpo::InvalidArgument(name + " " + value + " is unknown (see --help)");
    }
  }
  if (result.paths.size() != 3) throw gdpo::InvalidArgument("FOLDER, IN and OUT are needed (see --help)");
  return result;
}

void run(Arguments arguments) {
  const Codec reader = codec(arguments.paths[1]), writer = codec(arguments.paths[2]);
  std::error_code unequal;  // no such file, most often: then they are not the same
  if (std::filesystem::equivalent(arguments.paths[1], arguments.paths[2], unequal)) {
    throw gdpo::InvalidArgument(arguments.paths[2] + ": OUT is the input itself; name another file");
  }
  const gdpo::Picture in = reader.read(arguments.paths[1], 100'000'000);
  const auto up = gdpo::Upscaler::load(arguments.paths[0], arguments.options);
  gdpo::Picture out(gdpo::output_size(in.size, arguments.request.scale), in.sample);
  if (arguments.progress) {
    arguments.request.progress = [](std::int64_t done, std::int64_t total) {
      std::cerr << "\rtile " << done << "/" << total << (done == total ? "\n" : "") << std::flush;
      return true;
    };
  }
  up.upscale(in.view(), out.span(), arguments.request);
  writer.write(arguments.paths[2], out);
}

}  // namespace

int main(int count, char** values) {
  if (count == 2 && (std::strcmp(values[1], "--help") == 0 || std::strcmp(values[1], "-h") == 0)) {
    std::cout << kUsage;
    return 0;
  }
  try {
    run(parse(count, values));
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
