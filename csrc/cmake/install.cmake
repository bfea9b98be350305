# `find_package(gdpo)` gives gdpo::shared and gdpo::static; `pkg-config gdpo` the shared one (--static the other).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS gdpo_shared gdpo_static gdpo_tool EXPORT gdpo)
install(DIRECTORY include/gdpo TYPE INCLUDE)
set(package ${CMAKE_INSTALL_LIBDIR}/cmake/gdpo)
install(EXPORT gdpo NAMESPACE gdpo:: FILE gdpoTargets.cmake DESTINATION ${package})
configure_package_config_file(cmake/gdpoConfig.cmake.in gdpoConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(gdpoConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(cmake/gdpo.pc.in gdpo.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/gdpoConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/gdpoConfigVersion.cmake
  DESTINATION ${package})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/gdpo.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
