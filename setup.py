"""The package layout and what is compiled. Everything else is in pyproject.toml.

The Triton kernels live in the top-level folder `kernels/`, but install as `gdpo._kernels` and import as
`gdpo.kernels` (see gdpo/kernels.py): a top-level package `kernels` would shadow the Hugging Face package of that name.

`engine._core`, the C++ upscaler, is built by CMake from csrc/. GDPO_BUILD_CSRC=auto (the default) builds it where that
works and says so where it does not; 1 makes a failure an error; 0 leaves it out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
FLAGS = [] if os.name == "nt" else ["-O3", "-fno-math-errno", "-pthread"]
CSRC = os.environ.get("GDPO_BUILD_CSRC", "auto")
if CSRC not in ("auto", "1", "0"):
    sys.exit(f"GDPO_BUILD_CSRC must be auto, 1 or 0; got {CSRC!r}")


class Build(build_ext):
    """Builds engine._core by CMake and the rest as pybind11 does."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "engine._core":
            super().build_extension(ext)
            return
        try:
            self._cmake(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if CSRC == "1":
                raise
            reason = (getattr(error, "output", None) or str(error)).strip().splitlines()[-1:] or ["unknown"]
            print(f"engine._core is left out, the engine runs in Python ({reason[0]}); GDPO_BUILD_CSRC=1 shows all")

    def _cmake(self, module: Path) -> None:
        import nlohmann_json

        folder = (Path(self.build_temp) / "csrc").resolve()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": module.parent,
            "CMAKE_UNITY_BUILD": "ON",
            "GDPO_PYTHON": "ON",
            "GDPO_JSON_INCLUDE": Path(nlohmann_json.__file__).parent / "include",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        module.parent.mkdir(parents=True, exist_ok=True)
        self._run("cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), *defines)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(os.cpu_count() or 1, 8))
        self._run("cmake", "--build", str(folder), "--parallel", jobs)

    def _run(self, *command: str) -> None:
        shown = CSRC == "1"
        subprocess.run(
            command,
            check=True,
            text=True,
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.STDOUT,
        )


extensions: list[Extension] = [
    Pybind11Extension(
        "gdpo._kernels._complexity_cpu",
        ["kernels/complexity_cpu.cpp"],
        cxx_std=17,
        extra_compile_args=FLAGS,
        extra_link_args=FLAGS[2:],
        optional=True,  # without a compiler the same runs in torch, several times slower
    )
]
if CSRC == "1" or (CSRC == "auto" and sys.platform == "linux"):
    extensions.append(Extension("engine._core", [], optional=CSRC == "auto"))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    packages=[*find_packages(include=["gdpo", "gdpo.*", "engine", "engine.*"]), "gdpo._kernels"],
    package_dir={"gdpo._kernels": "kernels"},
    package_data={"gdpo": ["resources/*"], "engine": ["data/*", "data/*/*", "*.pyi"]},
)
