/// What the library throws. Every message is one line: what was wrong, what was expected, what to do.
#pragma once

#include <gdpo/export.hpp>
#include <stdexcept>
#include <string>

namespace gdpo {

/// The kinds of failure; the numbers are the return codes of the C interface (gdpo.h).
enum class Status : int {
  ok = 0,
  invalid_argument = 1,
  folder = 2,
  backend = 3,
  not_finite = 4,
  cancelled = 5,
  out_of_memory = 6,
  internal = 7,
};

/// Base of all. Memory that cannot be had is std::bad_alloc.
class GDPO_API Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const noexcept { return status_; }

 private:
  Status status_;
};

/// An argument is not what it should be; the message names it.
class GDPO_API InvalidArgument : public Error {
 public:
  explicit InvalidArgument(const std::string& message) : Error(Status::invalid_argument, message) {}
};

/// An engine folder is missing, stale, damaged, foreign or not trusted.
class GDPO_API FolderError : public Error {
 public:
  explicit FolderError(const std::string& message) : Error(Status::folder, message) {}
};

/// The backend is not installed or cannot run here; the message names the remedy.
class GDPO_API BackendError : public Error {
 public:
  explicit BackendError(const std::string& message) : Error(Status::backend, message) {}
};

/// The model gave a value that is not finite; the message names the tile.
class GDPO_API NotFinite : public Error {
 public:
  explicit NotFinite(const std::string& message) : Error(Status::not_finite, message) {}
};

/// The progress callback asked to stop.
class GDPO_API Cancelled : public Error {
 public:
  explicit Cancelled(const std::string& message) : Error(Status::cancelled, message) {}
};

}  // namespace gdpo
