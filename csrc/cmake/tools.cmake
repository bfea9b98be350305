# gdpo-upscale-cpp: PPM always, PNG where libpng is.
add_executable(gdpo_tool tools/upscale.cpp)
set_target_properties(gdpo_tool PROPERTIES OUTPUT_NAME gdpo-upscale-cpp)
target_link_libraries(gdpo_tool PRIVATE gdpo_static gdpo_flags)
find_package(PNG QUIET)
if(PNG_FOUND)
  target_compile_definitions(gdpo_tool PRIVATE GDPO_PNG)
  target_link_libraries(gdpo_tool PRIVATE PNG::PNG)
endif()
