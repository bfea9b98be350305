#include "arrays.hpp"

#include <string>
#include <vector>

#include "common.hpp"

namespace py = pybind11;

namespace gdpo::python {
namespace {

using detail::text;

// DLPack's structures, version 0 (dlpack.h; the layout is stable).
struct DlDevice {
  std::int32_t type, id;
};
struct DlType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t rank;
  DlType type;
  std::int64_t* shape;
  std::int64_t* strides;  // in items, or null where packed
  std::uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};
constexpr std::int32_t kCpu = 1, kPinned = 3;
constexpr std::uint8_t kUnsigned = 1;

}  // namespace

Borrowed::Borrowed(const py::object& object, const char* name, bool writable) {
  if (PyObject_CheckBuffer(object.ptr()) != 0) {
    from_buffer(object, name, writable);
  } else if (py::hasattr(object, "__dlpack__")) {
    from_dlpack(object, name, writable);
  } else {
    throw py::type_error(text(name, " must be an array [H,W,3] of uint8 or uint16 (a buffer or DLPack); got ",
                              std::string(py::str(py::type::of(object).attr("__name__")))));
  }
}

ImageView Borrowed::view() const {
  ImageView result;
  result.data = image_.data;
  result.bytes = image_.bytes;
  result.size = image_.size;
  result.channels = image_.channels;
  result.sample = image_.sample;
  result.row_stride = image_.row_stride;
  result.column_stride = image_.column_stride;
  result.channel_stride = image_.channel_stride;
  return result;
}

void Borrowed::from_buffer(const py::object& object, const char* name, bool writable) {
  const auto release = [](void* p) {
    auto* const view = static_cast<Py_buffer*>(p);
    PyBuffer_Release(view);
    delete view;
  };
  auto view = std::make_unique<Py_buffer>();
  if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) !=
      0) {
    throw py::error_already_set();
  }
  Py_buffer* const held = view.release();
  owner_ = std::shared_ptr<void>(held, release);
  std::string format = held->format != nullptr ? held->format : "B";
  if (!format.empty() && (format[0] == '@' || format[0] == '=' || format[0] == '<')) format.erase(0, 1);
  const std::int64_t item = format == "B" ? 1 : format == "H" ? 2 : 0;
  const std::vector<std::int64_t> shape(held->shape, held->shape + held->ndim);
  const std::vector<std::int64_t> strides(held->strides, held->strides + held->ndim);
  fill(name, held->buf, item, shape.data(), strides.data(), held->ndim);
}

void Borrowed::from_dlpack(const py::object& object, const char* name, bool writable) {
  const py::tuple device = object.attr("__dlpack_device__")();
  const auto kind = device[0].cast<std::int32_t>();
  if (kind != kCpu && kind != kPinned) {
    throw py::value_error(text(name, " must be in the memory of the CPU; its DLPack device is ", kind));
  }
  const py::capsule capsule = object.attr("__dlpack__")();
  auto* const managed = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  owner_ = std::shared_ptr<void>(managed, [](void* p) {
    auto* const tensor = static_cast<DlManaged*>(p);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  });
  // Version 0 has no flag for memory that must not be written: its producers refuse to export such.
  static_cast<void>(writable);
  const DlTensor& tensor = managed->tensor;
  const bool samples = tensor.type.code == kUnsigned && tensor.type.lanes == 1;
  const std::int64_t item = samples && (tensor.type.bits == 8 || tensor.type.bits == 16) ? tensor.type.bits / 8 : 0;
  std::vector<std::int64_t> strides(static_cast<std::size_t>(tensor.rank));
  std::int64_t packed = item;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    strides[i] = tensor.strides != nullptr ? tensor.strides[i] * item : packed;
    packed *= tensor.shape[i];
  }
  fill(name, static_cast<char*>(tensor.data) + tensor.byte_offset, item, tensor.shape, strides.data(), tensor.rank);
}

void Borrowed::fill(const char* name, void* data, std::int64_t item, const std::int64_t* shape,
                    const std::int64_t* strides, int rank) {
  if (rank != 3 || shape[2] != 3 || shape[0] < 1 || shape[1] < 1) {
    std::string list;
    for (int i = 0; i < rank; ++i) list += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    throw py::value_error(text(name, " must be [H,W,3]; got (", list, ")"));
  }
  if (item == 0) throw py::value_error(text(name, " must be uint8 or uint16"));
  image_.data = data;
  image_.size = {shape[0], shape[1]};
  image_.sample = item == 1 ? Sample::u8 : Sample::u16;
  image_.row_stride = strides[0];
  image_.column_stride = strides[1];
  image_.channel_stride = strides[2];
  std::int64_t end = item;
  for (int i = 0; i < 3; ++i) {
    if (strides[i] < 0) {
      throw py::value_error(text(name, " has a negative stride; numpy.ascontiguousarray makes a copy without"));
    }
    end += (shape[i] - 1) * strides[i];
  }
  image_.bytes = static_cast<std::size_t>(end);
}

}  // namespace gdpo::python
