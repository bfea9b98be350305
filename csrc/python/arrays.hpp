/// Pictures of Python objects without copies: the buffer protocol (numpy) or DLPack (torch, jax, ...).
#pragma once

#include <pybind11/pybind11.h>

#include <gdpo/image.hpp>
#include <memory>

namespace gdpo::python {

/// A picture in memory that a Python object owns; keeps the object alive. Needs the GIL to be made and destroyed.
class Borrowed {
 public:
  /// @param name of the argument, for messages
  /// @param writable the object must let its memory be written
  /// @throws py::type_error, py::value_error
  Borrowed(const pybind11::object& object, const char* name, bool writable);

  ImageView view() const;
  ImageSpan span() const { return image_; }

 private:
  void from_buffer(const pybind11::object& object, const char* name, bool writable);
  void from_dlpack(const pybind11::object& object, const char* name, bool writable);
  void fill(const char* name, void* data, std::int64_t item, const std::int64_t* shape, const std::int64_t* strides,
            int rank);

  ImageSpan image_;
  std::shared_ptr<void> owner_;
};

}  // namespace gdpo::python
