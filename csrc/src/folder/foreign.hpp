/// What a path is that is not an engine folder; engine/runtime/foreign.py says the same in Python.
#pragma once

#include <string>

namespace gdpo::detail {

/// Whether an engine folder was written there; it may be damaged.
bool is_engine(const std::string& path);

/// One line about a path that is not an engine folder: what it is, and how to get an engine folder.
std::string explain(const std::string& path);

}  // namespace gdpo::detail
