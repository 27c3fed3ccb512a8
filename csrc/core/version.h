// The version and the build choices of this library; CMake defines both texts.
#pragma once

#ifndef SIDESTEP_VERSION
#error "SIDESTEP_VERSION comes from CMakeLists.txt, which reads it from pyproject.toml"
#endif
#ifndef SIDESTEP_CUDA_INFO
#error "SIDESTEP_CUDA_INFO comes from CMakeLists.txt: \"yes (archs)\" or \"no: reason\""
#endif

#if defined(__clang__)
#define SIDESTEP_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define SIDESTEP_COMPILER "gcc " __VERSION__
#else
#define SIDESTEP_COMPILER "unknown"
#endif
