#include "folder/foreign.hpp"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <system_error>

namespace gdpo::detail {
namespace {

namespace fs = std::filesystem;

bool has_file(const fs::path& folder, const char* name) {
  std::error_code ignored;
  return fs::is_regular_file(folder / name, ignored);
}

bool is_checkpoint(const fs::path& path) {
  return has_file(path, "state.json") && has_file(path, "trainable.safetensors");
}

bool is_generator(const fs::path& path) {
  std::error_code ignored;
  return fs::is_directory(path / "unet", ignored);
}

bool is_run(const fs::path& path) { return has_file(path, "metrics.jsonl") && !is_generator(path); }

std::string exported(const std::string& model) { return "python -m engine.export " + model + " --out DIR"; }

bool holds_weights(const fs::path& file) {
  std::string suffix = file.extension().string();
  std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char c) { return std::tolower(c); });
  return suffix == ".pth" || suffix == ".safetensors" || suffix == ".param" || suffix == ".pkl";
}

std::string explain_file(const std::string& path) {
  const fs::path parent = fs::path(path).parent_path();
  if (is_engine(parent.string())) {
    return path + ": this is a file of an engine folder; name the folder: " + (parent.empty() ? "." : parent.string());
  }
  if (is_checkpoint(parent)) return explain(parent.empty() ? "." : parent.string());
  const std::string what = path + ": this is a file, not an engine folder; ";
  if (holds_weights(path)) {
    return what + "if it holds a network's weights, make a model of it: python -m gdpo.convert " + path +
           " --out MODEL; then an engine folder of that: " + exported("MODEL");
  }
  return what + "one is made by python -m engine.export";
}

}  // namespace

bool is_engine(const std::string& path) { return has_file(path, "manifest.json") && has_file(path, "manifest.sha256"); }

std::string explain(const std::string& path) {
  std::error_code failed;
  if (path.empty()) return "the model's name is empty; an unset variable?";
  if (path.rfind("hub:", 0) == 0) {
    return path + ": a model on the Hub is not an engine folder; make one of it: " + exported(path);
  }
  if (!fs::exists(path, failed)) {
    return path + ": no such folder; an engine folder is made by python -m engine.export";
  }
  if (!fs::is_directory(path, failed)) return explain_file(path);
  if (is_checkpoint(path)) {
    return path + ": this is a checkpoint of a training run, not an engine folder; make a model of it: " +
           "python -m gdpo.merge " + path + " --out MODEL; then an engine folder of that: " + exported("MODEL");
  }
  if (is_run(path)) {
    const std::string what =
        path + ": this is the folder of a training run, not an engine folder; make one of its model: ";
    if (is_generator(fs::path(path) / "model")) return what + exported((fs::path(path) / "model").string());
    return what + "python -m gdpo.merge " + path + "/checkpoint-N --out MODEL; then " + exported("MODEL");
  }
  if (is_generator(path)) {
    return path + ": this is a generator's folder, not an engine folder; make one of it: " + exported(path) +
           "; then, for speed, python -m engine.build DIR --out ENGINE";
  }
  if (fs::is_empty(path, failed)) {
    return path + ": this folder is empty; an engine folder is made by python -m engine.export";
  }
  return path +
         ": no manifest.json with its manifest.sha256 in it, so it is not an engine folder; "
         "one is made by python -m engine.export";
}

}  // namespace gdpo::detail
