/// The part of ONNX Runtime's C interface that inference needs, declared by hand: its headers are not needed to build.
///
/// The table is append-only: a function keeps its slot for ever. Slots and signatures are those of
/// onnxruntime_c_api.h; `check_table` compares what can be compared with the library that was found.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gdpo::detail::ort {

struct Allocator;
struct CudaOptions;
struct Env;
struct MemoryInfo;
struct RunOptions;
struct Session;
struct SessionOptions;
struct Status;  // null where a call succeeded
struct TensorInfo;
struct TypeInfo;
struct Value;

constexpr std::uint32_t kApiVersion = 16;       // 1.16
constexpr std::uint32_t kExternalVersion = 18;  // 1.18: weights in memory beside the model
constexpr int kLogFatal = 4, kFloat = 1, kDeviceAllocator = 0, kDefaultMemory = 0;

// X(slot, result, name, parameters)
#define GDPO_ORT_FUNCTIONS(X)                                                                                      \
  X(0, Status*, CreateStatus, (int code, const char* message))                                                     \
  X(1, int, GetErrorCode, (const Status*))                                                                         \
  X(2, const char*, GetErrorMessage, (const Status*))                                                              \
  X(3, Status*, CreateEnv, (int level, const char* name, Env**))                                                   \
  X(8, Status*, CreateSessionFromArray,                                                                            \
    (const Env*, const void* model, std::size_t, const SessionOptions*, Session**))                                \
  X(9, Status*, Run,                                                                                               \
    (Session*, const RunOptions*, const char* const* input_names, const Value* const* inputs, std::size_t,         \
     const char* const* output_names, std::size_t, Value** outputs))                                               \
  X(10, Status*, CreateSessionOptions, (SessionOptions**))                                                         \
  X(17, Status*, DisableMemPattern, (SessionOptions*))                                                             \
  X(22, Status*, SetSessionLogSeverityLevel, (SessionOptions*, int level))                                         \
  X(24, Status*, SetIntraOpNumThreads, (SessionOptions*, int))                                                     \
  X(25, Status*, SetInterOpNumThreads, (SessionOptions*, int))                                                     \
  X(30, Status*, SessionGetInputCount, (const Session*, std::size_t*))                                             \
  X(31, Status*, SessionGetOutputCount, (const Session*, std::size_t*))                                            \
  X(33, Status*, SessionGetInputTypeInfo, (const Session*, std::size_t, TypeInfo**))                               \
  X(34, Status*, SessionGetOutputTypeInfo, (const Session*, std::size_t, TypeInfo**))                              \
  X(36, Status*, SessionGetInputName, (const Session*, std::size_t, Allocator*, char**))                           \
  X(37, Status*, SessionGetOutputName, (const Session*, std::size_t, Allocator*, char**))                          \
  X(49, Status*, CreateTensorWithDataAsOrtValue,                                                                   \
    (const MemoryInfo*, void* data, std::size_t bytes, const std::int64_t* shape, std::size_t, int type, Value**)) \
  X(55, Status*, CastTypeInfoToTensorInfo, (const TypeInfo*, const TensorInfo**))                                  \
  X(60, Status*, GetTensorElementType, (const TensorInfo*, int*))                                                  \
  X(61, Status*, GetDimensionsCount, (const TensorInfo*, std::size_t*))                                            \
  X(62, Status*, GetDimensions, (const TensorInfo*, std::int64_t*, std::size_t))                                   \
  X(69, Status*, CreateCpuMemoryInfo, (int allocator, int memory, MemoryInfo**))                                   \
  X(76, Status*, AllocatorFree, (Allocator*, void*))                                                               \
  X(78, Status*, GetAllocatorWithDefaultOptions, (Allocator**))                                                    \
  X(92, void, ReleaseEnv, (Env*))                                                                                  \
  X(93, void, ReleaseStatus, (Status*))                                                                            \
  X(94, void, ReleaseMemoryInfo, (MemoryInfo*))                                                                    \
  X(95, void, ReleaseSession, (Session*))                                                                          \
  X(96, void, ReleaseValue, (Value*))                                                                              \
  X(98, void, ReleaseTypeInfo, (TypeInfo*))                                                                        \
  X(100, void, ReleaseSessionOptions, (SessionOptions*))                                                           \
  X(125, Status*, GetAvailableProviders, (char***, int* count))                                                    \
  X(126, Status*, ReleaseAvailableProviders, (char**, int count))                                                  \
  X(130, Status*, AddSessionConfigEntry, (SessionOptions*, const char* key, const char* value))                    \
  X(204, Status*, SessionOptionsAppendExecutionProvider_CUDA_V2, (SessionOptions*, const CudaOptions*))            \
  X(205, Status*, CreateCUDAProviderOptions, (CudaOptions**))                                                      \
  X(206, Status*, UpdateCUDAProviderOptions,                                                                       \
    (CudaOptions*, const char* const* keys, const char* const* values, std::size_t))                               \
  X(208, void, ReleaseCUDAProviderOptions, (CudaOptions*))

constexpr std::size_t kExternalSlot = 279;
using AddExternalInitializersFromFilesInMemory = Status* (*)(SessionOptions*, const char* const* names,
                                                             char* const* data, const std::size_t* bytes, std::size_t);

/// The functions, by name.
struct Api {
#define GDPO_DECLARE(slot, result, name, parameters) result(*name) parameters = nullptr;
  GDPO_ORT_FUNCTIONS(GDPO_DECLARE)
#undef GDPO_DECLARE
};

/// Take the functions out of a table. Returns the name of the first one that `is_code` refuses, or null.
template <typename Check>
const char* take(Api& api, const void* const* table, const Check& is_code) {
#define GDPO_TAKE(slot, result, name, parameters) \
  if (!is_code(table[slot])) return #name;        \
  api.name = reinterpret_cast<result(*) parameters>(const_cast<void*>(table[slot]));
  GDPO_ORT_FUNCTIONS(GDPO_TAKE)
#undef GDPO_TAKE
  return nullptr;
}

/// What OrtGetApiBase returns.
struct Base {
  const void* const* (*GetApi)(std::uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace gdpo::detail::ort
