#include "folder/manifest.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "backends/registry.hpp"
#include "folder/files.hpp"
#include "folder/foreign.hpp"
#include "folder/sha256.hpp"
#include "picture/noise.hpp"
#include "picture/resample.hpp"

namespace gdpo::detail {
namespace {

using Json = nlohmann::json;

constexpr int kFormat = 1;
constexpr std::int64_t kMostSide = 1 << 16;
constexpr int kDeepest = 32;  // of nested arrays and objects
const std::set<std::string> kFields = {"backend", "backend_version", "precision", "geometry", "profile",
                                       "graphs",  "model",           "source",    "parity",   "options",
                                       "extras",  "architecture",    "resampler", "noise",    "format"};

/// A value as it stands in the file, shortened.
std::string shown(const Json& value) {
  std::string result = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (result.size() > 80) result = result.substr(0, 80) + "...";
  return result;
}

const Json& field(const Json& object, const char* name) {
  if (!object.is_object() || !object.contains(name))
    throw FolderError(text("not a manifest of an engine folder (no ", name, ")"));
  return object.at(name);
}

const std::string& string(const Json& value, const char* name) {
  if (!value.is_string()) throw FolderError(text(name, " must be a string; got ", shown(value)));
  return value.get_ref<const std::string&>();
}

/// A line of text: at most 1000 printable characters of ASCII.
std::string line(const Json& value, const char* name) {
  if (value.is_string()) {
    const auto& found = value.get_ref<const std::string&>();
    if (found.size() <= 1000 && std::all_of(found.begin(), found.end(), [](char c) { return c >= ' ' && c <= '~'; })) {
      return found;
    }
  }
  throw FolderError(text(name, " must be a line of text; got ", shown(value)));
}

/// A plain file name: letters, digits, "_" "-" and, after the first, "."; at most 100.
std::string file_name(const Json& value) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  };
  if (value.is_string()) {
    const auto& name = value.get_ref<const std::string&>();
    if (!name.empty() && name.size() <= 100 && plain(name[0]) &&
        std::all_of(name.begin(), name.end(), [&](char c) { return plain(c) || c == '.'; })) {
      return name;
    }
  }
  throw FolderError(shown(value) + " is not a plain file name");
}

std::string hash(const Json& value) {
  if (value.is_string()) {
    const auto& digits = value.get_ref<const std::string&>();
    const auto hexadecimal = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    if (digits.size() == 64 && std::all_of(digits.begin(), digits.end(), hexadecimal)) return digits;
  }
  throw FolderError(shown(value) + " is not a SHA-256");
}

std::int64_t number(const Json& value, const std::string& name, std::int64_t most) {
  if (value.is_number_integer()) {
    const bool fits = !value.is_number_unsigned() || value.get<std::uint64_t>() <= static_cast<std::uint64_t>(most);
    if (fits && value.get<std::int64_t>() >= 1 && value.get<std::int64_t>() <= most) return value.get<std::int64_t>();
  }
  throw FolderError(text(name, " must be 1 to ", most, "; got ", shown(value)));
}

Span span(const Json& value, const std::string& name, std::int64_t most) {
  if (!value.is_array() || value.size() != 3)
    throw FolderError(text(name, " must be three numbers; got ", shown(value)));
  const Span result = {number(value[0], name, most), number(value[1], name, most), number(value[2], name, most)};
  if (result[0] > result[1] || result[1] > result[2]) {
    throw FolderError(text(name, " must rise from least to usual to largest; got ", shown(value)));
  }
  return result;
}

Tensor tensor(const Json& value) {
  Tensor result;
  const auto& dtype = string(field(value, "dtype"), "dtype");
  const auto& shape = field(value, "shape");
  result.name = line(field(value, "name"), "name");
  if (value.size() != 3 || (dtype != "float32" && dtype != "float16") || !shape.is_array() || shape.size() > 8) {
    throw FolderError(shown(value) + " does not describe a tensor");
  }
  for (const auto& side : shape) {
    if (side.is_string()) {
      result.shape.emplace_back(side.get<std::string>());
    } else {
      result.shape.emplace_back(number(side, "a side of " + shown(value.at("name")), kMostSide));
    }
  }
  return result;
}

Graph graph(const Json& value) {
  Graph result;
  result.file = file_name(field(value, "file"));
  result.sha256 = hash(field(value, "sha256"));
  const auto& inputs = field(value, "inputs");
  const auto& data = field(value, "data");
  if (value.size() != 5 || !inputs.is_array() || !data.is_object())
    throw FolderError(shown(value) + " does not describe a graph");
  for (const auto& input : inputs) result.inputs.push_back(tensor(input));
  result.output = tensor(field(value, "output"));
  for (const auto& [name, digits] : data.items()) result.data[file_name(name)] = hash(digits);
  return result;
}

/// Whether a graph takes and gives what its role says: planes named `first`, and noise where it has a step.
void check_role(const std::string& name, const Graph& graph, const Manifest& manifest) {
  struct Role {
    const char *input, *output;
    bool picture_in, noise, picture_out;
  };
  static const std::map<std::string, Role> roles = {{"generator", {"image", "output", true, true, true}},
                                                    {"encoder", {"image", "latent", true, false, false}},
                                                    {"unet", {"latent", "x0", false, true, false}},
                                                    {"decoder", {"x0", "output", false, false, true}}};
  const auto planes = [&](const char* of, bool picture) {
    const auto prefix = std::string(picture ? "" : "latent_");
    return Tensor{of, {"batch", picture ? 3 : manifest.geometry.channels, prefix + "height", prefix + "width"}};
  };
  const auto same = [&](const Tensor& found, const Tensor& wanted) {
    if (found.name != wanted.name || found.shape.size() != 4) return false;
    for (std::size_t i = 0; i < 4; ++i) {  // a static plan has numbers where a dynamic one has names
      const auto* const number = std::get_if<std::int64_t>(&found.shape[i]);
      const auto* const name = std::get_if<std::string>(&wanted.shape[i]);
      const bool fits = number != nullptr && name != nullptr && *number == manifest.fixed_side(*name);
      if (!fits && found.shape[i] != wanted.shape[i]) return false;
    }
    return true;
  };
  const auto described = [](const Tensor& tensor) { return printable(tensor.name) + " " + tensor.describe(); };
  const auto& role = roles.at(name);
  std::vector<Tensor> wanted = {planes(role.input, role.picture_in)};
  if (role.noise) wanted.push_back(planes("noise", false));
  for (std::size_t i = 0; i < std::max(wanted.size(), graph.inputs.size()); ++i) {
    if (i >= wanted.size() || i >= graph.inputs.size() || !same(graph.inputs[i], wanted[i])) {
      throw FolderError(text("input ", i + 1, " of ", name, " must be ",
                             i < wanted.size() ? described(wanted[i]) : "absent", "; got ",
                             i < graph.inputs.size() ? described(graph.inputs[i]) : "none"));
    }
  }
  const auto result = planes(role.output, role.picture_out);
  if (!same(graph.output, result)) {
    throw FolderError(text("the output of ", name, " must be ", described(result), "; got ", described(graph.output)));
  }
}

Manifest checked(const Json& content) {
  const auto& format = field(content, "format");
  if (format != kFormat) {
    throw FolderError(
        text("its format is ", shown(format), ", this version reads ", kFormat, "; build the folder again"));
  }
  for (const auto& name : kFields) field(content, name.c_str());
  for (const auto& [name, value] : content.items()) {
    if (kFields.count(name) == 0) throw FolderError("unknown field " + shown(name));
  }
  Manifest result;
  const auto& geometry = content["geometry"];
  const auto part = [&](const char* name, std::int64_t most) {
    return number(field(geometry, name), std::string("geometry.") + name, most);
  };
  result.geometry = {part("scale", 16), part("factor", 64), part("channels", 4096), part("multiple", 4096),
                     part("overlap", 4096)};
  if (geometry.size() != 5) throw FolderError("geometry has unknown fields: " + shown(geometry));
  if (result.geometry.multiple % result.geometry.factor != 0) {
    throw FolderError(
        text("multiple ", result.geometry.multiple, " must be a multiple of factor ", result.geometry.factor));
  }
  const auto& profile = content["profile"];
  result.batch = span(field(profile, "batch"), "profile.batch", 1024);
  result.tile = span(field(profile, "tile"), "profile.tile", kMostSide);
  if (profile.size() != 2) throw FolderError("profile has unknown fields: " + shown(profile));
  for (const std::int64_t side : result.tile) {
    if (side % result.geometry.multiple != 0) {
      throw FolderError(
          text("tile sides ", shown(profile["tile"]), " must be multiples of ", result.geometry.multiple));
    }
  }
  if (!content["graphs"].is_object()) throw FolderError("graphs must be an object");
  std::set<std::string> names;
  for (const auto& [name, value] : content["graphs"].items()) {
    result.graphs[name] = graph(value);
    names.insert(name);
  }
  if (names != std::set<std::string>{"generator"} && names != std::set<std::string>{"encoder", "unet", "decoder"}) {
    std::string found;
    for (const auto& name : names) found += (found.empty() ? "" : ", ") + printable(name);
    throw FolderError(
        text("graphs must be generator, or encoder, unet and decoder; got ", found.empty() ? "none" : found));
  }
  for (const auto& [name, entry] : result.graphs) check_role(name, entry, result);
  std::set<std::string> files = {"manifest.json", "manifest.sha256"};
  for (const auto& [name, entry] : result.graphs) {
    bool own = files.insert(entry.file).second;
    for (const auto& [file, digits] : entry.data) own = files.insert(file).second && own;
    if (!own) throw FolderError("graphs must have files of their own");
  }
  result.backend = string(content["backend"], "backend");
  result.backend_version = line(content["backend_version"], "backend_version");
  if (!content["architecture"].is_null()) {
    result.architecture = line(content["architecture"], "architecture");
  }
  if (find_backend(result.backend) == nullptr) {
    throw FolderError("backend must be one of " + backend_names() + "; got " + shown(result.backend));
  }
  const auto& precision = content["precision"];
  if (precision != "fp32" && precision != "fp16" && precision != "bf16") {
    throw FolderError("precision must be one of fp32, fp16, bf16; got " + shown(precision));
  }
  const Json noise = {{"generator", kGenerator}, {"table", kTableSha256}};
  for (const auto& [name, ours] : {std::pair<const char*, Json>("resampler", kResampler), {"noise", noise}}) {
    if (content[name] != ours) {
      throw FolderError(
          text("made for another ", name, " (", shown(content[name]), "); export it again with this version"));
    }
  }
  for (const auto* const name : {"model", "source", "parity", "options", "extras"}) {
    if (!content[name].is_object()) throw FolderError(text(name, " must be an object"));
  }
  for (const auto& [name, digits] : content["source"].items()) static_cast<void>(line(name, "source") + hash(digits));
  for (const auto& [name, digits] : content["extras"].items()) static_cast<void>(file_name(name) + hash(digits));
  const auto& options = content["options"];
  result.version_compatible = options.contains("version_compatible") && options["version_compatible"] == true;
  return result;
}

}  // namespace

std::string Tensor::describe() const {
  std::string result;
  for (const auto& side : shape) {
    result += result.empty() ? "[" : ",";
    result += std::holds_alternative<std::string>(side) ? printable(std::get<std::string>(side))
                                                        : std::to_string(std::get<std::int64_t>(side));
  }
  return result.empty() ? "[]" : result + "]";
}

std::string printable(const std::string& name) {
  const bool plain = !name.empty() && name.size() <= 40 &&
                     std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 127; });
  return plain ? name : shown(name);
}

std::int64_t Manifest::fixed_side(const std::string& dimension) const {
  const bool latent = dimension.rfind("latent_", 0) == 0;
  const Span& range = dimension == "batch" ? batch : tile;
  return range[0] != range[2] ? 0 : latent ? range[0] / geometry.factor : range[0];
}

Manifest parse_manifest(const char* begin, const char* end) {
  try {
    std::vector<std::set<std::string>> names;  // of the objects that are open
    const auto strict = [&names](int depth, Json::parse_event_t event, Json& value) {
      // Printing what is nested would need a stack as deep.
      if (depth > kDeepest) throw FolderError(text("nested more than ", kDeepest, " deep"));
      if (event == Json::parse_event_t::object_start) names.emplace_back();
      if (event == Json::parse_event_t::object_end) names.pop_back();
      if (event == Json::parse_event_t::key && !names.back().insert(value.get<std::string>()).second) {
        throw FolderError("its JSON has a name twice");
      }
      return true;
    };
    // The parser passes over a byte order mark, and takes a zero byte for the end, whatever follows.
    if (std::find(begin, end, '\0') != end || (begin != end && *begin == '\xef')) {
      throw FolderError("not a manifest of an engine folder (a zero byte or a byte order mark in it)");
    }
    return checked(Json::parse(begin, end, strict));
  } catch (const Json::exception& error) {
    throw FolderError(text("not a manifest of an engine folder (", one_line(error.what()), ")"));
  }
}

Manifest load_manifest(const std::string& folder) {
  if (!is_engine(folder)) throw FolderError(explain(folder));
  const std::string path = folder + "/manifest.json";
  const Bytes content = read_regular(path, kMaxManifestBytes);
  const Bytes checksum = read_regular(folder + "/manifest.sha256", kMaxManifestBytes);
  const std::string expected = sha256(content.data(), content.size()) + "  manifest.json\n";
  if (std::string(checksum.data(), checksum.size()) != expected) {
    throw FolderError(path + ": damaged or edited (manifest.sha256 differs); build it again");
  }
  try {
    return parse_manifest(content.data(), content.data() + content.size());
  } catch (const FolderError& error) {
    throw FolderError(path + ": " + error.what());
  }
}

Bytes read_file(const std::string& folder, const std::string& name, const std::string& expected) {
  const std::string path = folder + "/" + name;
  Bytes content = read_regular(path, kMaxModelBytes);
  const std::string found = sha256(content.data(), content.size());
  if (found != expected) {
    throw FolderError(text(path, ": its SHA-256 ", found.substr(0, 12), "... is not the manifest's ",
                           expected.substr(0, 12), "...: stale, damaged or of another model; build the folder again"));
  }
  return content;
}

bool built_here(const std::string& sha256) {
  const char* const data = std::getenv("XDG_DATA_HOME");
  const char* const home = std::getenv("HOME");
  if ((data == nullptr || *data == 0) && home == nullptr) return false;
  const std::string base = data != nullptr && *data != 0 ? data : std::string(home) + "/.local/share";
  const std::string path = base + "/gdpo-sr/plans.txt";
  if (!is_file(path)) return false;
  const Bytes content = read_regular(path, kMaxManifestBytes);
  std::istringstream words(std::string(content.data(), content.size()));
  for (std::string word; words >> word;) {
    if (word == sha256) return true;
  }
  return false;
}

}  // namespace gdpo::detail
