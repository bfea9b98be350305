/// Where finished rows go: into the caller's picture, or band by band to the caller's function.
#pragma once

#include <gdpo/upscaler.hpp>
#include <vector>

#include "common.hpp"

namespace gdpo::detail {

class Destination {
 public:
  explicit Destination(const ImageSpan& whole) : size(whole.size), sample(whole.sample), whole_(whole) {}
  Destination(Size size, Sample sample, const BandSink& sink) : size(size), sample(sample), sink_(&sink) {}

  const Size size;
  const Sample sample;

  /// Memory for rows, from the top to the bottom. It is the caller's until the next call.
  ImageSpan rows(Range rows);

  /// They are written. On the thread that called `upscale`.
  void done(Range rows);

  /// Give every pixel its luma: what is neutral (R = G = B everywhere) stays so.
  void keep_neutral() { neutral_ = true; }

 private:
  ImageSpan whole_;
  const BandSink* sink_ = nullptr;
  ImageSpan band_;
  bool neutral_ = false;
  std::vector<std::uint16_t> memory_;
};

/// Whether R = G = B in every pixel.
bool is_neutral(const ImageView& image);

}  // namespace gdpo::detail
