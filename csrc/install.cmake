# Installs libsidestep, its headers, and the package files that find_package(sidestep) reads.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/sidestep")
install(TARGETS sidestep EXPORT sidestepTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES
  csrc/include/sidestep/engine.h
  csrc/include/sidestep/graphs.h
  csrc/include/sidestep/parareal.h
  csrc/include/sidestep/plan.h
  csrc/include/sidestep/scheduler.h
  csrc/include/sidestep/sidestep.h
  csrc/include/sidestep/sidestep.hpp
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/sidestep)
install(EXPORT sidestepTargets NAMESPACE sidestep:: DESTINATION ${config_dir})

# A static library asks its user for the libraries it stands on; a shared one has them inside.
set(dependencies "include(CMakeFindDependencyMacro)\n")
if(NOT BUILD_SHARED_LIBS)
  string(APPEND dependencies "find_dependency(Threads)\n")
  if(SIDESTEP_HAS_CUDA)
    string(APPEND dependencies "find_dependency(CUDAToolkit)\n")
  endif()
endif()
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/sidestepConfig.cmake"
  "${dependencies}include(\"\${CMAKE_CURRENT_LIST_DIR}/sidestepTargets.cmake\")\n")
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/sidestepConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/sidestepConfig.cmake"
  "${CMAKE_CURRENT_BINARY_DIR}/sidestepConfigVersion.cmake" DESTINATION ${config_dir})
