# How a library of BitLab is installed: found by CMake and by pkg-config under any prefix, also one that is chosen when
# installing, staged with DESTDIR, or moved afterwards.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# An absolute directory under the prefix is the same thing said in another way, and would not move with the prefix.
# Others are taken as they are.
foreach(dir LIBDIR INCLUDEDIR)
  set(BITLAB_INSTALL_${dir} ${CMAKE_INSTALL_${dir}})
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${dir}}")
    cmake_path(IS_PREFIX CMAKE_INSTALL_PREFIX "${CMAKE_INSTALL_${dir}}" NORMALIZE is_below)
    if(is_below)
      file(RELATIVE_PATH BITLAB_INSTALL_${dir} "${CMAKE_INSTALL_PREFIX}" "${CMAKE_INSTALL_${dir}}")
    endif()
  endif()
endforeach()

# bitlab_install_package(NAME DESCRIPTION text [DEPENDS names...] [HEADERS folders...])
#
# Installs the static library target NAME, the HEADERS folders (include/NAME, as a folder), the CMake package NAME with
# the target NAME::NAME, and NAME.pc: all in the component cpp. DEPENDS: libraries installed in the same way that NAME
# is linked to. All are linked to Threads::Threads.
function(bitlab_install_package name)
  cmake_parse_arguments(PARSE_ARGV 1 package "" "DESCRIPTION" "DEPENDS;HEADERS")
  if(NOT BITLAB_INSTALL)
    return()
  endif()
  install(TARGETS ${name} EXPORT ${name}Targets ARCHIVE DESTINATION ${BITLAB_INSTALL_LIBDIR} COMPONENT cpp
    INCLUDES DESTINATION ${BITLAB_INSTALL_INCLUDEDIR})
  foreach(folder IN LISTS package_HEADERS)
    install(DIRECTORY ${folder} DESTINATION ${BITLAB_INSTALL_INCLUDEDIR} COMPONENT cpp)
  endforeach()

  set(cmake_dir ${BITLAB_INSTALL_LIBDIR}/cmake/${name})
  set(find_dependencies "find_dependency(Threads)")
  foreach(package IN LISTS package_DEPENDS)
    string(APPEND find_dependencies
      "\nfind_dependency(${package} ${PROJECT_VERSION} EXACT HINTS \${CMAKE_CURRENT_LIST_DIR}/../${package})")
  endforeach()
  configure_package_config_file(${CMAKE_CURRENT_FUNCTION_LIST_DIR}/packageConfig.cmake.in ${name}Config.cmake
    INSTALL_DESTINATION ${cmake_dir})
  write_basic_package_version_file(${name}ConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  install(EXPORT ${name}Targets NAMESPACE ${name}:: DESTINATION ${cmake_dir} COMPONENT cpp)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${name}Config.cmake ${CMAKE_CURRENT_BINARY_DIR}/${name}ConfigVersion.cmake
    DESTINATION ${cmake_dir} COMPONENT cpp)

  bitlab_pkg_config_paths(pc_prefix pc_libdir pc_includedir)
  list(TRANSFORM package_DEPENDS APPEND " = ${PROJECT_VERSION}" OUTPUT_VARIABLE pc_requires)
  list(JOIN pc_requires ", " pc_requires)
  configure_file(${CMAKE_CURRENT_FUNCTION_LIST_DIR}/package.pc.in ${name}.pc @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/${name}.pc DESTINATION ${BITLAB_INSTALL_LIBDIR}/pkgconfig COMPONENT cpp)
endfunction()

# The prefix as seen from the .pc file, and the directories of libraries and headers as seen from the prefix. A library
# directory outside the prefix does not say where the prefix is: then it is the one that CMake was configured with.
function(bitlab_pkg_config_paths prefix libdir includedir)
  if(IS_ABSOLUTE "${BITLAB_INSTALL_LIBDIR}")
    set(${prefix} ${CMAKE_INSTALL_PREFIX} PARENT_SCOPE)
  else()
    file(RELATIVE_PATH up "/${BITLAB_INSTALL_LIBDIR}/pkgconfig" /)
    string(REGEX REPLACE "/$" "" up "${up}")
    set(${prefix} "\${pcfiledir}/${up}" PARENT_SCOPE)
  endif()
  foreach(dir LIBDIR INCLUDEDIR)
    string(TOLOWER ${dir} result)
    if(IS_ABSOLUTE "${BITLAB_INSTALL_${dir}}")
      set(path ${BITLAB_INSTALL_${dir}})
    else()
      set(path "\${prefix}/${BITLAB_INSTALL_${dir}}")
    endif()
    set(${${result}} ${path} PARENT_SCOPE)
  endforeach()
endfunction()
