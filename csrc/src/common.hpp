/// Small things that every part uses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <gdpo/error.hpp>
#include <limits>
#include <memory>
#include <new>
#include <sstream>
#include <string>

// A function compiled for several instruction sets, the best chosen when the library is loaded. Every file is built
// with -ffp-contract=off: a fused multiply-add would round once where Python rounds twice. The sanitizers cannot run
// the chooser, which runs before they are ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GDPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GDPO_CLONES
#endif

namespace gdpo::detail {

/// A half-open range.
struct Range {
  std::int64_t first = 0, last = 0;
  std::int64_t length() const { return last - first; }
};

/// The parts one after the other, as text.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Somebody else's words for a message of ours: one line of printable ASCII.
inline std::string one_line(std::string words) {
  for (char& c : words) {
    if (c < ' ' || c > '~') c = c == '\n' || c == '\t' ? ' ' : '?';
  }
  return words;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// The product of sizes, none negative.
/// @throws std::bad_alloc where it is beyond what memory can hold
template <typename... Sizes>
std::size_t elements(Sizes... sizes) {
  std::size_t product = 1;
  for (const auto size : {static_cast<std::int64_t>(sizes)...}) {
    if (size < 0 || __builtin_mul_overflow(product, static_cast<std::size_t>(size), &product)) throw std::bad_alloc();
  }
  return product;
}

/// An array that is not initialised, aligned for vectors.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) : size_(count) {
    if (count > static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max()) / sizeof(T))
      throw std::bad_alloc();
    data_.reset(static_cast<T*>(::operator new(count * sizeof(T), kAlignment)));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data_.get()[i]; }
  const T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace gdpo::detail
