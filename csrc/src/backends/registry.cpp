#include "backends/registry.hpp"

#include <algorithm>
#include <cstdlib>

namespace gdpo::detail {
namespace {

std::unique_ptr<Backend> not_from_cpp(const Options&) {
  throw BackendError(
      "plans of TensorRT-RTX run from Python only; build this folder for tensorrt or onnxruntime to use it from C++");
}

}  // namespace

const std::vector<BackendEntry>& backends() {
  static const std::vector<BackendEntry> all = {
      {"onnx", {"onnx"}, false, onnxruntime_backend},
      {"onnxruntime", {"onnxruntime", "onnx"}, false, onnxruntime_backend},
      {"tensorrt", {"tensorrt"}, true, tensorrt_backend},
      {"tensorrt-rtx", {"tensorrt-rtx"}, true, not_from_cpp},
  };
  return all;
}

bool BackendEntry::can_run(const std::string& built_for) const {
  return std::find(runs.begin(), runs.end(), built_for) != runs.end();
}

const BackendEntry* find_backend(const std::string& name) {
  const auto& all = backends();
  const auto found = std::find_if(all.begin(), all.end(), [&](const BackendEntry& b) { return b.name == name; });
  return found == all.end() ? nullptr : &*found;
}

std::string backend_names() {
  std::string names;
  for (const auto& backend : backends()) names += (names.empty() ? "" : ", ") + backend.name;
  return names;
}

int gpu_index(const std::string& device) {
  if (device == "cpu") return -1;
  if (device == "cuda") return 0;
  const bool numbered = device.rfind("cuda:", 0) == 0 && device.size() > 5 && device.size() < 9;
  if (numbered && device.find_first_not_of("0123456789", 5) == std::string::npos) return std::atoi(device.c_str() + 5);
  throw InvalidArgument("device must be cpu, cuda or cuda:N; got '" + device + "'");
}

}  // namespace gdpo::detail
