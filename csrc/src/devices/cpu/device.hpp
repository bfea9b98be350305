/// The CPU as a device: a pool of threads around the sessions.
#pragma once

#include "devices/cpu/finish.hpp"
#include "picture/device.hpp"
#include "picture/resample.hpp"

namespace gdpo::detail {

class CpuDevice : public Device {
 public:
  CpuDevice(const Job& job, Pool& pool);

  Slots slots(Session& session, const std::vector<Shape>& inputs, const Shape& output) override;
  void images(const Tiles& tiles, float* slot) override;
  void noise(const Tiles& tiles, float* slot) override;
  void cut(Target field, const Tiles& tiles, float* slot) override;
  void run(Session& session) override;
  void blend(Target target, const Tiles& tiles, const float* output) override;
  Outcome settle(const Tiles& tiles) override;
  void take(Range rows) override;

 private:
  /// Sums of weighted tiles, [channels, ring, columns]: row r of the whole lies at r % ring.
  struct Band {
    Band(std::int64_t channels, std::int64_t resolution, std::int64_t ring, const Plan& plan);
    std::int64_t channels, resolution, ring, columns;
    std::vector<float> down, across;  // the tiles' weights
    Buffer<float> values;
  };

  Band& band(Target target);

  /// Fill the tiles of a slot and repeat the last one up to the batch.
  template <typename Make>
  void each(const Tiles& tiles, std::int64_t channels, std::int64_t resolution, float* slot, const Make& make) const;

  const Job& job_;
  Pool& pool_;
  const Geometry& geometry_;
  const Resampler in_;
  std::unique_ptr<Band> bands_[3];
  std::vector<Buffer<float>> inputs_;
  Buffer<float> output_;
  std::vector<Feed> feeds_;
  Shape shape_;
  double seconds_ = 0;
  Finish finish_;
};

}  // namespace gdpo::detail
