// The complexity map on the CPU (see complexity.py, which has the definition and runs without this file too).
//
// A patch at a time, in registers and the first-level cache. Resize and Sobel are separable and linear: the gradient of
// the resized patch P is S P D^T and D P S^T, with S and D [64, size] the resize followed by [1,2,1] and [-1,0,1].
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace py = pybind11;

namespace {

constexpr int kSide = 64;
constexpr int kPixels = kSide * kSide;
constexpr uint32_t kBins = 256;  // the upper half of the 512: a magnitude is not negative
constexpr float kBinsPerUnit = 512.0f / 11.0f;

// A row of the resized patch, aligned so that the compiler need not peel loops over it.
template <typename T>
struct alignas(64) Row {
  T at[kSide];
};

// S and D transposed, [size, 64], for one patch size, and for every resized position the samples that it depends on.
struct Factors {
  explicit Factors(int samples) : size(samples), smooth(kSide * samples), derive(kSide * samples) {
    for (int i = 0; i < kSide; ++i) {
      first[i] = samples;
      last[i] = -1;
      for (int k = 0; k < samples; ++k) {
        const float before = weight(std::max(i - 1, 0), k), here = weight(i, k),
                    after = weight(std::min(i + 1, kSide - 1), k);
        smooth[k * kSide + i] = before + 2 * here + after;
        derive[k * kSide + i] = after - before;
        if (before != 0 || here != 0 || after != 0) {
          first[i] = std::min(first[i], k);
          last[i] = k;
        }
      }
    }
  }

  float weight(int position, int sample) const {
    const float source = (position + 0.5f) * size / kSide - 0.5f;
    return std::max(1 - std::abs(std::clamp(source, 0.0f, size - 1.0f) - sample), 0.0f);
  }

  int size;
  std::vector<float> smooth, derive;
  std::array<int, kSide> first, last;
};

// Minus p log2 p of every count in a histogram of all 4096 pixels.
std::vector<float> entropy_of_counts() {
  std::vector<float> table(kPixels + 1);
  for (int count = 0; count <= kPixels; ++count) {
    const double p = count / (kPixels + 1e-5);
    table[count] = static_cast<float>(-p * std::log2(p + 1e-10));
  }
  return table;
}

// Bins of one row of the resized patch, from P D^T and P S^T, [size, 64] each. Every loop over x is a plain one over a
// whole row: compilers make vectors of those, not of nests (2.7 times the speed here).
FOR_EVERY_CPU void bins_of_row(const Factors& rows, int y, const Row<float>* __restrict derived,
                               const Row<float>* __restrict smoothed, Row<uint32_t>& bins) {
  Row<float> dx = {}, dy = {};
  for (int k = rows.first[y]; k <= rows.last[y]; ++k) {
    const float s = rows.smooth[k * kSide + y], d = rows.derive[k * kSide + y];
    const float *px = derived[k].at, *py = smoothed[k].at;
    for (int x = 0; x < kSide; ++x) dx.at[x] += s * px[x];
    for (int x = 0; x < kSide; ++x) dy.at[x] += d * py[x];
  }
  for (int x = 0; x < kSide; ++x) {
    const float scaled = std::sqrt(dx.at[x] * dx.at[x] + dy.at[x] * dy.at[x]) * kBinsPerUnit;
    const auto bin = static_cast<uint32_t>(static_cast<int32_t>(scaled));  // a minimum of floats is not vectorised
    bins.at[x] = bin < kBins ? bin : kBins;
  }
}

FOR_EVERY_CPU void along_columns(const Factors& columns, const float* __restrict row, Row<float>& derived,
                                 Row<float>& smoothed) {
  Row<float> d = {}, s = {};
  for (int k = 0; k < columns.size; ++k) {
    const float value = row[k], *dk = &columns.derive[k * kSide], *sk = &columns.smooth[k * kSide];
    for (int x = 0; x < kSide; ++x) d.at[x] += dk[x] * value;
    for (int x = 0; x < kSide; ++x) s.at[x] += sk[x] * value;
  }
  derived = d;
  smoothed = s;
}

float patch_entropy(const Factors& rows, const Factors& columns, const float* patch, int64_t stride,
                    const std::vector<float>& table, std::vector<Row<float>>& scratch) {
  scratch.resize(2 * static_cast<size_t>(rows.size));
  Row<float>* derived = scratch.data();
  Row<float>* smoothed = derived + rows.size;
  for (int k = 0; k < rows.size; ++k) along_columns(columns, patch + k * stride, derived[k], smoothed[k]);

  // Four histograms in turn, so that equal neighbours do not wait for each other. Bin 256: beyond the range.
  uint16_t counts[4][kBins + 1] = {};
  Row<uint32_t> bins;
  for (int y = 0; y < kSide; ++y) {
    bins_of_row(rows, y, derived, smoothed, bins);
    for (int x = 0; x < kSide; x += 4)
      for (int lane = 0; lane < 4; ++lane) ++counts[lane][bins.at[x + lane]];
  }
  auto total = [&](uint32_t bin) { return counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin]; };
  float entropy = 0;
  const int counted = kPixels - total(kBins);
  for (uint32_t bin = 0; bin < kBins; ++bin) {
    if (counted == kPixels) {
      entropy += table[total(bin)];
    } else {
      const float p = total(bin) / (counted + 1e-5f);
      entropy -= p * std::log2(p + 1e-10f);
    }
  }
  return entropy;
}

// gray [B,H,W] float32, contiguous -> complexity [B,H,W], the same for all pixels of a patch.
py::array_t<float> complexity_map(py::array_t<float, py::array::c_style> gray, int patch, int threads) {
  if (gray.ndim() != 3 || patch < 1) throw py::value_error("gray must be [B,H,W] and patch at least 1");
  const int64_t images = gray.shape(0), height = gray.shape(1), width = gray.shape(2);
  const int64_t down = (height + patch - 1) / patch, across = (width + patch - 1) / patch;
  py::array_t<float> out({images, height, width});
  const float* source = gray.data();
  float* target = out.mutable_data();

  const auto size = [patch](int64_t whole, int64_t index) {
    return static_cast<int>(std::min<int64_t>(patch, whole - index * patch));
  };
  static const std::vector<float> table = entropy_of_counts();
  const Factors full(patch), last_row(size(height, down - 1)), last_column(size(width, across - 1));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    std::vector<Row<float>> scratch;
    for (int64_t strip; (strip = next++) < images * down;) {
      const int64_t b = strip / down, index = strip % down, first = (b * height + index * patch) * width;
      const Factors& rows = size(height, index) == patch ? full : last_row;
      for (int64_t left = 0; left < width; left += patch) {
        const Factors& columns = width - left >= patch ? full : last_column;
        const float bits = patch_entropy(rows, columns, source + first + left, width, table, scratch);
        std::fill_n(target + first + left, columns.size, bits * rows.size * columns.size);
      }
      for (int64_t y = 1; y < rows.size; ++y) std::copy_n(target + first, width, target + first + y * width);
    }
  };
  py::gil_scoped_release unlocked;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, images * down); ++i) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  return out;
}

}  // namespace

PYBIND11_MODULE(_complexity_cpu, m) {
  m.doc() = "The complexity map of gray pictures, on the CPU.";
  m.def("complexity_map", &complexity_map, py::arg("gray").noconvert(), py::arg("patch"), py::arg("threads"));
}
