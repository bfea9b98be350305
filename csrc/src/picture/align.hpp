/// The last part of a picture's way: colours, other factors than x4, the caller's samples.
#pragma once

#include <gdpo/upscaler.hpp>

#include "picture/resample.hpp"

namespace gdpo::detail {

/// Align the colours of the restored picture to those of the input and write it to `out`.
/// @param picture [H,W,3], of the size of `in`; overwritten
/// @param in the input on its way to that size
/// @param full the largest value of an input sample
void finish(Buffer<std::uint16_t>& picture, const Resampler& in, float full, Color color, Pool& pool,
            const ImageSpan& out);

}  // namespace gdpo::detail
