// Read a picture, upscale it, write it: upscale FOLDER in.ppm out.ppm (README.md beside this file).
#include <gdpo/pnm.hpp>
#include <gdpo/upscaler.hpp>
#include <iostream>

int main(int count, char** values) {
  if (count != 4) {
    std::cerr << "usage: upscale FOLDER in.ppm out.ppm\n";
    return 2;
  }
  try {
    const auto up = gdpo::Upscaler::load(values[1]);
    const gdpo::Picture in = gdpo::read_ppm(values[2]);
    gdpo::Picture out(gdpo::output_size(in.size), in.sample);
    up.upscale(in.view(), out.span());
    gdpo::write_ppm(values[3], out);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
