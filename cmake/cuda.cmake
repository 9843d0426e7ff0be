# Sets TILEWRIGHT_CUDA_FOUND and enables CUDA if TILEWRIGHT_CUDA allows it and nvcc compiles a probe.
# nvcc is looked for in $CUDACXX, then on PATH, then in /usr/local/cuda.
set(TILEWRIGHT_CUDA_FOUND OFF)
if(NOT TILEWRIGHT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TILEWRIGHT_CUDA is '${TILEWRIGHT_CUDA}'; allowed are AUTO, ON and OFF.")
endif()
if(TILEWRIGHT_CUDA STREQUAL "OFF")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # an nvcc installed since the last configure should be seen
endif()
if(NOT DEFINED ENV{CUDACXX})
  find_program(TILEWRIGHT_NVCC nvcc PATHS /usr/local/cuda/bin NO_CACHE)
  if(TILEWRIGHT_NVCC)
    set(ENV{CUDACXX} ${TILEWRIGHT_NVCC})
  endif()
endif()
set(ENV{CUDAARCHS} "${TILEWRIGHT_CUDA_ARCHS}")
set(CMAKE_CUDA_ARCHITECTURES "${TILEWRIGHT_CUDA_ARCHS}")
include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.1)
    set(TILEWRIGHT_CUDA_FOUND ON)
    # Keeps what ptxas says about registers and spills beside each object, for scripts/ptxas_report.py.
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/scripts/keep_log.py
        ${CMAKE_CXX_COMPILER_LAUNCHER})
  endif()
endif()

if(NOT TILEWRIGHT_CUDA_FOUND AND TILEWRIGHT_CUDA STREQUAL "ON")
  message(FATAL_ERROR
    "TILEWRIGHT_CUDA=ON, but no nvcc builds for the architectures '${TILEWRIGHT_CUDA_ARCHS}'.\n"
    "Looked at: CUDACXX, PATH, /usr/local/cuda; found: '$ENV{CUDACXX}' ${CMAKE_CUDA_COMPILER_VERSION}.\n"
    "Install the CUDA toolkit 12.1 or newer and set CUDACXX to its nvcc, name other architectures in "
    "TILEWRIGHT_CUDA_ARCHS, or set TILEWRIGHT_CUDA=OFF for the CPU package.")
elseif(NOT TILEWRIGHT_CUDA_FOUND)
  message(NOTICE "tilewright: found no nvcc (12.1 or newer) that builds for '${TILEWRIGHT_CUDA_ARCHS}'; this is the CPU package.")
endif()
