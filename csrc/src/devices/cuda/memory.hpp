/// What a picture takes of the GPU's memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "devices/cuda/cuda.hpp"
#include "devices/cuda/kernels.hpp"
#include "picture/device.hpp"
#include "picture/resample.hpp"

namespace gdpo::detail {

inline constexpr std::int64_t kLowPassRows = 1024;  ///< of a band that the wavelet works on

/// Parts of one piece of device memory. Built twice: at address 0 to learn the size, then where the memory is.
class Parts {
 public:
  explicit Parts(CUdeviceptr base) : base_(base) {}

  /// Room for values that kernels write.
  template <typename T>
  T* room(std::size_t count) {
    const std::size_t at = (size_ + 255) / 256 * 256;
    size_ = at + elements(count, sizeof(T));
    return reinterpret_cast<T*>(base_ + at);
  }

  /// Room for values that kernels read, before any other: they go to the device in one piece.
  template <typename T>
  const T* constant(const std::vector<T>& values) {
    const T* const at = room<T>(values.size());
    constants_.resize(size_);
    std::memcpy(constants_.data() + size_ - values.size() * sizeof(T), values.data(), values.size() * sizeof(T));
    return at;
  }

  Filter filter(const Taps& taps) {
    const std::vector<std::int32_t> first(taps.first.begin(), taps.first.end());
    return {constant(first), constant(taps.weights), taps.count};
  }

  std::size_t size() const { return size_; }
  const std::vector<char>& constants() const { return constants_; }

 private:
  CUdeviceptr base_;
  std::size_t size_ = 0;
  std::vector<char> constants_;
};

/// The most tiles of one call.
inline std::int64_t most_places(const Plan& plan) { return std::min(plan.batch, plan.columns.count()); }

/// What a picture takes of the device's memory.
struct Memory {
  Memory(Parts parts, const Job& job)
      : in{nullptr,
           job.in.sample == Sample::u16,
           job.in.size.height,
           job.in.size.width,
           job.plan.size.height,
           job.plan.size.width,
           parts.filter({job.in.size.height, job.plan.size.height}),
           parts.filter({job.in.size.width, job.plan.size.width})} {
    const Plan& plan = job.plan;
    const auto& geometry = job.model.manifest.geometry;
    const Size from = job.in.size, to = job.out.size;
    const std::int64_t h = plan.size.height, w = plan.size.width, f = geometry.factor;
    const std::int64_t item = job.in.sample_bytes();
    const bool staged = job.model.staged(), resized = job.resized();
    const Color color = job.request.color;
    if (resized) {
      out = {nullptr, true, h, w, to.height, to.width, parts.filter({h, to.height}), parts.filter({w, to.width})};
    }
    auto starts = plan.columns.starts;  // and the last one again, for a row's last batch where that is too short
    starts.resize(starts.size() + static_cast<std::size_t>(job.model.manifest.batch[0]) - 1,
                  plan.columns.starts.back());
    lefts = parts.constant(starts);
    down[0] = parts.constant(plan.rows.weights(f)), across[0] = parts.constant(plan.columns.weights(f));
    if (staged) down[1] = parts.constant(plan.rows.weights(1)), across[1] = parts.constant(plan.columns.weights(1));
    constants = parts.constants();

    in.samples = source = parts.room<char>(elements(from.height, from.width, 3, item));
    result = parts.room<char>(elements(to.height, to.width, 3, item));
    picture = parts.room<std::uint16_t>(elements(h, w, 3));
    out.samples = aligned = resized && color != Color::none ? parts.room<std::uint16_t>(elements(h, w, 3)) : picture;
    band = parts.room<float>(elements(3, plan.rows.tile * f, plan.columns.end() * f));
    for (float*& field : fields) {
      field = parts.room<float>(staged ? elements(geometry.channels, plan.rows.end(), plan.columns.end()) : 0);
    }
    sums = parts.room<std::uint64_t>(12);
    tables = parts.room<std::uint16_t>(elements(3, kFull + 1));
    for (float*& plane : low) {
      plane = parts.room<float>(color == Color::wavelet ? elements(3, std::min(h, kLowPassRows + 2 * kHalo), w) : 0);
    }
    not_finite = parts.room<std::int32_t>(elements(most_places(plan)));
    size = parts.size();
  }

  Resize in, out{};  // of the input to the model's size, and of that to the caller's
  const std::int64_t* lefts;
  const float *down[2], *across[2];  // weights of tiles at the picture's and at the latents' resolution
  std::vector<char> constants;
  char *source, *result;
  std::uint16_t *picture, *aligned, *tables;  // [H,W,3], the same with aligned colours
  float *band, *fields[2], *low[2];
  std::uint64_t* sums;
  std::int32_t* not_finite;
  std::size_t size;
};

}  // namespace gdpo::detail
