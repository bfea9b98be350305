/// A shared library that is looked for when it is needed.
#pragma once

#include <string>
#include <vector>

namespace gdpo::detail {

class Library {
 public:
  /// Load the first of `names` that loads. `found()` tells whether one did and `reasons()` why not.
  explicit Library(const std::vector<std::string>& names);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  bool found() const { return handle_ != nullptr; }
  const std::string& name() const { return name_; }
  const std::string& reasons() const { return reasons_; }

  /// Whether it is there and memory lacks for it.
  bool no_memory() const;

  /// A symbol's address, or null.
  void* find(const char* symbol) const;

 private:
  void* handle_ = nullptr;
  std::string name_, reasons_;
};

/// Names to try: the one given, else that of the environment variable, else the defaults.
std::vector<std::string> candidates(const std::string& given, const char* variable, std::vector<std::string> defaults);

/// Whether two addresses lie in the same loaded object.
bool same_object(const void* a, const void* b);

}  // namespace gdpo::detail
