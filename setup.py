"""The package layout. Everything else is in pyproject.toml.

The Triton kernels live in the top-level folder `kernels/`, but install as `gdpo._kernels` and import as
`gdpo.kernels` (see gdpo/kernels.py): a top-level package `kernels` would shadow the Hugging Face package of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gdpo", "gdpo.*", "engine", "engine.*"]), "gdpo._kernels"],
    package_dir={"gdpo._kernels": "kernels"},
    package_data={"gdpo": ["data/*"], "engine": ["data/*", "data/*/*", "*.pyi"]},
)
