#include "picture/restore.hpp"

#include <algorithm>

namespace gdpo::detail {
namespace {

/// One input of a graph: its planes, and what fills its slot with tiles.
struct Input {
  std::int64_t channels, resolution;
  std::function<void(const Tiles& tiles, float* slot)> fill;
};

/// Run all tiles of a graph and blend them.
void stage(const Job& job, Device& device, const char* name, const std::vector<Input>& inputs, Target target,
           const Step& step, double* seconds) {
  const Model& model = job.model;
  const Plan& plan = job.plan;
  const Geometry& geometry = model.manifest.geometry;
  Session& session = *model.sessions.at(name);
  const bool picture = target == Target::picture;
  const std::int64_t resolution = picture ? geometry.factor : 1, channels = picture ? 3 : geometry.channels;
  const Axis &rows = plan.rows, &columns = plan.columns;
  const auto shape = [&](std::int64_t batch, std::int64_t planes, std::int64_t samples) {
    return Shape{batch, planes, rows.tile * samples, columns.tile * samples};
  };
  for (std::int64_t i = 0; i < rows.count(); ++i) {
    for (std::int64_t j = 0; j < columns.count(); j += plan.batch) {
      const std::int64_t count = std::min(plan.batch, columns.count() - j);
      const Tiles tiles{i, j, count, std::max(count, model.manifest.batch[0])};
      std::vector<Shape> shapes;
      for (const auto& input : inputs) shapes.push_back(shape(tiles.batch, input.channels, input.resolution));
      const Slots slots = device.slots(session, shapes, shape(tiles.batch, channels, resolution));
      for (std::size_t k = 0; k < inputs.size(); ++k) inputs[k].fill(tiles, slots.inputs[k]);
      device.run(session);
      device.blend(target, tiles, slots.output);
      const auto outcome = device.settle(tiles);
      *seconds += outcome.seconds;
      if (outcome.not_finite >= 0) {
        const std::int64_t f = geometry.factor;
        throw NotFinite(text("the ", name, " gave a value that is not finite in the tile at row ", rows.starts[i] * f,
                             ", column ", columns.starts[j + outcome.not_finite] * f, " (", rows.tile * f, "x",
                             columns.tile * f, " output pixels); try another precision"));
      }
      step(count);
    }
    if (!picture) continue;
    const std::int64_t next = i + 1 < rows.count() ? rows.starts[i + 1] : rows.end();
    device.take({rows.starts[i] * resolution, next * resolution});
  }
}

}  // namespace

void restore(const Job& job, Device& device, const Step& step, double* seconds) {
  const auto& geometry = job.model.manifest.geometry;
  const Input image{3, geometry.factor, [&](const Tiles& tiles, float* slot) { device.images(tiles, slot); }};
  const Input noise{geometry.channels, 1, [&](const Tiles& tiles, float* slot) { device.noise(tiles, slot); }};
  const auto cut = [&](Target field) {
    return Input{geometry.channels, 1,
                 [&device, field](const Tiles& tiles, float* slot) { device.cut(field, tiles, slot); }};
  };
  const auto run = [&](const char* name, const std::vector<Input>& inputs, Target target) {
    stage(job, device, name, inputs, target, step, seconds);
  };
  if (!job.model.staged()) return run("generator", {image, noise}, Target::picture);
  run("encoder", {image}, Target::encoded);
  run("unet", {cut(Target::encoded), noise}, Target::noised);
  run("decoder", {cut(Target::noised)}, Target::picture);
}

}  // namespace gdpo::detail
