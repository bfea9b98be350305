# engine._core. setup.py names the interpreter, pybind11's and the module's folder.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 3.1 CONFIG REQUIRED)
pybind11_add_module(_core MODULE python/core.cpp python/arrays.cpp $<TARGET_OBJECTS:gdpo_objects>)
target_include_directories(_core PRIVATE include src)
target_link_libraries(_core PRIVATE gdpo_flags Threads::Threads ${CMAKE_DL_LIBS})
