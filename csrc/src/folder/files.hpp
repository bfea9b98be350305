/// Files of a folder that may be hostile: regular ones only, no links, read once.
#pragma once

#include <string>

#include "folder/manifest.hpp"

namespace gdpo::detail {

/// A regular file, and no link that could lead out of the folder.
bool is_file(const std::string& path);

/// The bytes of a regular file. @throws FolderError: it is missing, a link, or longer than `limit`
Bytes read_regular(const std::string& path, std::int64_t limit);

}  // namespace gdpo::detail
