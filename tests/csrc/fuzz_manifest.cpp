/// Any bytes as a manifest: a manifest whose picture can be planned, or a FolderError.
#include "folder/manifest.hpp"
#include "picture/plan.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace gdpo;
  const auto* const text = reinterpret_cast<const char*>(data);
  try {
    const auto manifest = detail::parse_manifest(text, text + size);
    for (const auto& [name, graph] : manifest.graphs) graph.output.describe();
    Request request;
    request.tile = static_cast<int>(size % 300);
    detail::Plan(manifest, {static_cast<std::int64_t>(size % 97 + 1), 50}, request);
  } catch (const FolderError&) {
  } catch (const InvalidArgument&) {
  } catch (const std::bad_alloc&) {  // sizes that no memory holds
  }
  return 0;
}
