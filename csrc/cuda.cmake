# Decides whether the CUDA kernels are built. SIDESTEP_CUDA (environment): auto (default) builds them
# when a toolkit works, 1 fails without one, 0 leaves them out.
#
# Sets SIDESTEP_HAS_CUDA and SIDESTEP_CUDA_INFO ("yes (80, 90, 100)" or "no: reason"), and enables the
# language.

set(SIDESTEP_HAS_CUDA OFF)
set(SIDESTEP_CUDA_INFO "")
set(wanted "$ENV{SIDESTEP_CUDA}")
if(wanted STREQUAL "")
  set(wanted auto)
endif()
if(NOT wanted MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "SIDESTEP_CUDA is \"${wanted}\", expected auto, 1 or 0")
endif()

# An nvcc on PATH may be a wrapper: the toolkit is the first folder that holds the runtime's header.
set(SIDESTEP_CUDA_ROOT "")
if(NOT DEFINED SIDESTEP_CUDA_PLACES)
  set(SIDESTEP_CUDA_PLACES "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda)
endif()
foreach(root IN LISTS SIDESTEP_CUDA_PLACES)
  if(NOT SIDESTEP_CUDA_ROOT AND root AND EXISTS "${root}/include/cuda_runtime.h")
    set(SIDESTEP_CUDA_ROOT "${root}")
  endif()
endforeach()

if(wanted STREQUAL "0")
  set(SIDESTEP_CUDA_INFO "no: SIDESTEP_CUDA=0")
elseif(NOT SIDESTEP_CUDA_ROOT)
  set(SIDESTEP_CUDA_INFO
    "no: no include/cuda_runtime.h in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
elseif(NOT EXISTS "${SIDESTEP_CUDA_ROOT}/bin/nvcc")
  set(SIDESTEP_CUDA_INFO "no: ${SIDESTEP_CUDA_ROOT} has no bin/nvcc")
else()
  # A toolkit that cannot compile (a host compiler too new for it, say) counts as none.
  unset(CMAKE_CUDA_COMPILER CACHE)
  set(ENV{CUDACXX} "${SIDESTEP_CUDA_ROOT}/bin/nvcc")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real)
    set(CUDAToolkit_ROOT "${SIDESTEP_CUDA_ROOT}")
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(names "80, 90")
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100)  # machine code, and PTX for what comes after it
      string(APPEND names ", 100")
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(SIDESTEP_HAS_CUDA ON)
    set(SIDESTEP_CUDA_INFO "yes (${names})")
  else()
    set(SIDESTEP_CUDA_INFO
      "no: ${SIDESTEP_CUDA_ROOT}/bin/nvcc cannot compile with this host compiler")
  endif()
endif()

if(wanted STREQUAL "1" AND NOT SIDESTEP_HAS_CUDA)
  message(FATAL_ERROR
    "SIDESTEP_CUDA=1 asks for the CUDA kernels, but the answer is ${SIDESTEP_CUDA_INFO}")
endif()
