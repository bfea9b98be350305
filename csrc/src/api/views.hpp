/// Checks of pictures in the caller's memory.
#pragma once

#include <gdpo/image.hpp>

namespace gdpo::detail {

/// @throws InvalidArgument: no data, no size, not 3 channels, a negative stride, fewer bytes than the strides reach
void check_input(const ImageView& image);

/// Besides that: samples share no memory, the size and the samples are as given, nothing overlaps the input.
void check_output(const ImageSpan& image, const ImageView& input, Size size);

}  // namespace gdpo::detail
