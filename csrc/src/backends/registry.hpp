/// The backends of this project: what each of them runs, and how it is opened. See engine/runtime/backends/registry.py.
#pragma once

#include <string>
#include <vector>

#include "backends/backend.hpp"

namespace gdpo::detail {

struct BackendEntry {
  std::string name;
  std::vector<std::string> runs;  ///< what folders may be built for
  bool is_plan;                   ///< executable code, made for one GPU
  /// @throws BackendError: its library is not here; the message names the remedy
  std::unique_ptr<Backend> (*open)(const Options& options);

  bool can_run(const std::string& built_for) const;
};

/// In the order of messages.
const std::vector<BackendEntry>& backends();

/// @return null: there is none of that name
const BackendEntry* find_backend(const std::string& name);

/// "onnx, onnxruntime, tensorrt, tensorrt-rtx"
std::string backend_names();

}  // namespace gdpo::detail
