"""The package layout. Everything else is in pyproject.toml.

The Triton kernels live in the top-level folder `kernels/`, but install as `gdpo._kernels` and import as
`gdpo.kernels` (see gdpo/kernels.py): a top-level package `kernels` would shadow the Hugging Face package of that name.
"""

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

FLAGS = [] if os.name == "nt" else ["-O3", "-fno-math-errno", "-pthread"]

setup(
    ext_modules=[
        Pybind11Extension(
            "gdpo._kernels._complexity_cpu",
            ["kernels/complexity_cpu.cpp"],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=FLAGS[2:],
            optional=True,  # without a compiler the same runs in torch, several times slower
        )
    ],
    packages=[*find_packages(include=["gdpo", "gdpo.*", "engine", "engine.*"]), "gdpo._kernels"],
    package_dir={"gdpo._kernels": "kernels"},
    package_data={"gdpo": ["data/*"], "engine": ["data/*", "data/*/*", "*.pyi"]},
)
