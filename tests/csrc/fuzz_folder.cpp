/// A model file of any bytes, hashed correctly: ONNX Runtime loads it and runs, or a typed error. GDPO_FUZZ_FOLDER
/// names a good folder; its manifest is written around the bytes. What happens inside ONNX Runtime is its own: this
/// looks for crashes and leaks of the loader around it.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gdpo/upscaler.hpp>
#include <vector>

#include "folder/sha256.hpp"

namespace fs = std::filesystem;

namespace {

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const char* const good = std::getenv("GDPO_FUZZ_FOLDER");
  if (good == nullptr) std::abort();
  static const std::string name = (fs::temp_directory_path() / "gdpo-fuzz-XXXXXX").string();
  static const fs::path folder = [] {
    std::string made = name;
    return fs::path(mkdtemp(made.data()));
  }();
  static const std::string manifest = content(fs::path(good) / "manifest.json");
  const std::string model(reinterpret_cast<const char*>(data), size), key = "\"sha256\": \"";
  std::string text = manifest;
  text.replace(text.find(key) + key.size(), 64, gdpo::detail::sha256(model.data(), model.size()));
  write(folder / "generator.onnx", model);
  write(folder / "manifest.json", text);
  write(folder / "manifest.sha256", gdpo::detail::sha256(text.data(), text.size()) + "  manifest.json\n");
  gdpo::Options options;
  options.threads = 1;
  try {
    const auto up = gdpo::Upscaler::load(folder.string(), options);
    std::vector<std::uint8_t> in(12 * 9 * 3, 100), out(48 * 36 * 3);
    up.upscale(gdpo::ImageView::packed(static_cast<const std::uint8_t*>(in.data()), {12, 9}),
               gdpo::ImageSpan::packed(out.data(), {48, 36}));
  } catch (const gdpo::Error&) {
  } catch (const std::bad_alloc&) {  // a model that asks for more than there is
  }
  return 0;
}
