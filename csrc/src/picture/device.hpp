/// Where the samples of a picture are worked on: the CPU, or a GPU. restore.cpp is the way of a picture; a device is
/// what each step of it does. The bytes are the same on all of them.
#pragma once

#include <gdpo/upscaler.hpp>
#include <vector>

#include "backends/backend.hpp"
#include "picture/destination.hpp"
#include "picture/plan.hpp"

namespace gdpo::detail {

/// One picture to upscale.
struct Job {
  const Model& model;
  const Plan& plan;
  const Request& request;
  ImageView in;
  Destination& out;

  float full() const { return in.sample == Sample::u8 ? 255.0f : 65535.0f; }  ///< the largest input sample
  bool resized() const { return out.size != plan.size; }
};

/// Neighbouring tiles of one row of tiles, which a backend gets at once: indices into the plan's axes. A session may
/// need more than are left in a row: then the last tile fills up to `batch`.
struct Tiles {
  std::int64_t row, column, count, batch;
};

/// What the tiles of a graph are blended into.
enum class Target { encoded, noised, picture };

/// The work on one picture, from the first tile to the last row.
class Device {
 public:
  virtual ~Device() = default;

  /// Where a session's inputs belong and where its output comes, valid until they are asked for again.
  virtual Slots slots(Session& session, const std::vector<Shape>& inputs, const Shape& output) = 0;

  /// Tiles of the upsampled input in [-1,1], [batch, 3, h, w]; beyond the picture it continues mirrored.
  virtual void images(const Tiles& tiles, float* slot) = 0;
  /// Tiles of the noise field, [batch, channels, h, w].
  virtual void noise(const Tiles& tiles, float* slot) = 0;
  /// Tiles cut from what was blended before, [batch, channels, h, w].
  virtual void cut(Target field, const Tiles& tiles, float* slot) = 0;

  /// Run a session from and to the slots last asked for.
  virtual void run(Session& session) = 0;
  /// Add tiles with their weights.
  virtual void blend(Target target, const Tiles& tiles, const float* output) = 0;

  /// What became of a run.
  struct Outcome {
    std::int64_t not_finite = -1;  ///< the first tile with such a value, or -1
    double seconds = 0;            ///< in the backend
  };
  /// Wait for the tiles of the last run.
  virtual Outcome settle(const Tiles& tiles) = 0;

  /// Rows of the restored picture have all of their tiles: align their colours and hand on what can be. They come from
  /// the top to the bottom, and the last ones may reach beyond the picture.
  virtual void take(Range rows) = 0;
};

}  // namespace gdpo::detail
