#include "backends/backend.hpp"

#include <cstdlib>

namespace gdpo::detail {

int gpu_index(const std::string& device) {
  if (device == "cpu") return -1;
  if (device == "cuda") return 0;
  const bool numbered = device.rfind("cuda:", 0) == 0 && device.size() > 5 && device.size() < 9;
  if (numbered && device.find_first_not_of("0123456789", 5) == std::string::npos) return std::atoi(device.c_str() + 5);
  throw InvalidArgument("device must be cpu, cuda or cuda:N; got '" + device + "'");
}

}  // namespace gdpo::detail
