/// The manifest of an engine folder, and the folder's files: see engine/runtime/manifest.py and docs/engine.md.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "common.hpp"

namespace gdpo::detail {

inline constexpr std::int64_t kMaxManifestBytes = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxModelBytes = std::int64_t{1} << 36;

/// An input or output of a graph; a dimension is a number or a name such as "height".
struct Tensor {
  std::string name;
  std::vector<std::variant<std::int64_t, std::string>> shape;
  std::string describe() const;  ///< "[batch,3,height,width]"
};

struct Graph {
  std::string file, sha256;
  std::vector<Tensor> inputs;
  Tensor output;
  std::map<std::string, std::string> data;  ///< files with weights beside it: name -> SHA-256
};

/// Least, usual and largest.
using Span = std::array<std::int64_t, 3>;

struct Geometry {
  std::int64_t scale, factor, channels, multiple, overlap;
};

struct Manifest {
  std::string backend, backend_version, architecture;  ///< architecture: of the GPU a plan is for, else empty
  Geometry geometry{};
  Span batch{}, tile{};
  std::map<std::string, Graph> graphs;
  bool version_compatible = false;  ///< a plan that other versions of its backend load too

  bool fixed() const { return tile[0] == tile[2]; }

  /// The length of a dimension by its name where the profile leaves no choice, else 0.
  std::int64_t fixed_side(const std::string& dimension) const;
};

/// A name from a file, for messages: as it stands there where it is a plain word, else escaped and shortened.
std::string printable(const std::string& name);

/// The bytes of a file that is read once.
using Bytes = Buffer<char>;

/// Read and check a folder's manifest.
/// @throws FolderError
Manifest load_manifest(const std::string& folder);

/// Check the bytes of a manifest. @throws FolderError
Manifest parse_manifest(const char* begin, const char* end);

/// The bytes of a folder's file, which must have the expected SHA-256.
/// @throws FolderError
Bytes read_file(const std::string& folder, const std::string& name, const std::string& sha256);

/// Whether this user built the plan of that hash (engine.build keeps the list).
bool built_here(const std::string& sha256);

}  // namespace gdpo::detail
