# The CUDA kernels: nvcc makes one fat binary of src/kernels.cu, which src/launch.cpp embeds. No CUDA library is linked.
find_program(GDPO_NVCC nvcc HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda PATH_SUFFIXES bin)
find_path(GDPO_CUDA_INCLUDE cuda.h HINTS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda
  PATH_SUFFIXES include targets/x86_64-linux/include)
if(GDPO_CUDA STREQUAL "auto" AND NOT TENSORRT_ROOT)
  set(reason "only the TensorRT backend uses them and TENSORRT_ROOT is empty")
elseif(NOT GDPO_NVCC OR NOT GDPO_CUDA_INCLUDE)
  set(reason "nvcc or the CUDA toolkit's cuda.h is not there")
else()
  set(reason "")
endif()
if(reason OR GDPO_CUDA STREQUAL "OFF")
  if(GDPO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GDPO_CUDA=ON: ${reason}; put nvcc on the PATH or set CUDA_HOME")
  elseif(GDPO_CUDA STREQUAL "OFF")
    set(reason "GDPO_CUDA=OFF")
  endif()
  message(STATUS "CUDA kernels: left out (${reason})")
  return()
endif()

set(GDPO_CUDA_ARCHITECTURES 80 90 100 CACHE STRING "what the kernels are compiled for; the last one also as PTX")
set(generate "")
foreach(architecture ${GDPO_CUDA_ARCHITECTURES})
  list(APPEND generate -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET GDPO_CUDA_ARCHITECTURES -1 last)
list(APPEND generate -gencode arch=compute_${last},code=compute_${last})
set(kernels ${CMAKE_CURRENT_BINARY_DIR}/kernels.fatbin)
set(source ${CMAKE_CURRENT_SOURCE_DIR}/src)
# -fmad=false as -ffp-contract=off: see docs/cpp.md.
add_custom_command(OUTPUT ${kernels}
  COMMAND ${GDPO_NVCC} -std=c++17 -O3 -fmad=false $<$<BOOL:${GDPO_WERROR}>:-Werror=all-warnings> -fatbin ${generate}
    ${source}/kernels.cu -o ${kernels}
  DEPENDS ${source}/kernels.cu ${source}/kernels.hpp ${source}/pixels.hpp COMMENT "CUDA kernels" VERBATIM)
set_source_files_properties(src/launch.cpp PROPERTIES OBJECT_DEPENDS ${kernels}
  COMPILE_DEFINITIONS "GDPO_KERNELS_FILE=\"${kernels}\"")
add_library(gdpo_cuda INTERFACE)
target_include_directories(gdpo_cuda SYSTEM INTERFACE ${GDPO_CUDA_INCLUDE})
target_compile_definitions(gdpo_cuda INTERFACE GDPO_CUDA_KERNELS)
set(GDPO_CUDA_SOURCES cuda launch restore_cuda)
string(REPLACE ";" " sm_" shown "sm_${GDPO_CUDA_ARCHITECTURES}")
message(STATUS "CUDA kernels: ${GDPO_NVCC} for ${shown}")
