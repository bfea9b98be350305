# The TensorRT backend: the headers of TENSORRT_ROOT and of the CUDA toolkit; both libraries are found at run time.
find_path(GDPO_TENSORRT_INCLUDE NvInferRuntime.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include NO_DEFAULT_PATH)
find_path(GDPO_CUDA_INCLUDE cuda_runtime_api.h HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda
  PATH_SUFFIXES include targets/x86_64-linux/include)
if(NOT GDPO_TENSORRT_INCLUDE OR NOT GDPO_CUDA_INCLUDE)
  message(FATAL_ERROR "TENSORRT_ROOT=${TENSORRT_ROOT}: NvInferRuntime.h or the CUDA toolkit's cuda_runtime_api.h is not "
    "there; set TENSORRT_ROOT (and CUDA_HOME), or leave TENSORRT_ROOT empty")
endif()
add_library(gdpo_tensorrt INTERFACE)
target_include_directories(gdpo_tensorrt SYSTEM INTERFACE ${GDPO_TENSORRT_INCLUDE} ${GDPO_CUDA_INCLUDE})
set(GDPO_TENSORRT_SOURCES backends/tensorrt devices/cuda/cuda)
