#include "backends/library.hpp"

#include <dlfcn.h>

#include <cstdlib>

namespace gdpo::detail {

Library::Library(const std::vector<std::string>& names) {
  for (const auto& name : names) {
    // Backends leave threads and thread-local data behind that would outlive their code: it is never unmapped.
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle_ != nullptr) {
      name_ = name;
      return;
    }
    const char* const reason = dlerror();
    reasons_ += (reasons_.empty() ? "" : "; ") + std::string(reason != nullptr ? reason : name);
  }
}

Library::~Library() {
  if (handle_ != nullptr) dlclose(handle_);
}

bool Library::no_memory() const {
  const auto has = [&](const char* words) { return reasons_.find(words) != std::string::npos; };
  return !found() && (has("failed to map segment") || has("annot allocate memory"));
}

void* Library::find(const char* symbol) const { return handle_ != nullptr ? dlsym(handle_, symbol) : nullptr; }

std::vector<std::string> candidates(const std::string& given, const char* variable, std::vector<std::string> defaults) {
  if (!given.empty()) return {given};
  const char* const value = std::getenv(variable);
  if (value != nullptr && *value != 0) return {value};
  return defaults;
}

bool same_object(const void* a, const void* b) {
  Dl_info first, second;
  return dladdr(a, &first) != 0 && dladdr(b, &second) != 0 && first.dli_fbase == second.dli_fbase;
}

}  // namespace gdpo::detail
