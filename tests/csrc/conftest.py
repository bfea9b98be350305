"""Builds of csrc/ and engine folders for its tests, made once for all workers of a run."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.runtime.core import library
from tests.support.cpp import CMAKE, ROOT, build, run

FUZZERS = tuple(f"fuzz_{name}" for name in ("manifest", "ppm", "views", "folder"))


def find_nvcc() -> str | None:
    """The compiler of a CUDA toolkit that has cuda.h too, where csrc/cmake/cuda.cmake looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = shutil.which("nvcc", path=os.pathsep.join([f"{h}/bin" for h in homes if h] + [os.environ.get("PATH", "")]))
    header = found and Path(found).resolve().parents[1] / "include" / "cuda.h"
    return found if header and header.is_file() else None


@pytest.fixture(scope="session")
def nvcc() -> str:
    return find_nvcc() or pytest.skip("needs nvcc and cuda.h: on the PATH, or CUDA_HOME")


@pytest.fixture(scope="session")
def compiler():
    if not shutil.which(os.environ.get("CXX", "c++")) or CMAKE is None:
        pytest.skip("needs a C++ compiler and cmake")
    if importlib.util.find_spec("nlohmann_json") is None:
        pytest.skip("needs nlohmann-json (pip install nlohmann-json)")


@pytest.fixture(scope="session")
def folders(shared) -> Path:
    """Engine folders, good and bad: see folders.py."""

    def make(out: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        run(sys.executable, ROOT / "tests" / "support" / "folders.py", out, cwd=ROOT, env=environment)

    return shared("folders", make)


@pytest.fixture(scope="session")
def runtime() -> dict[str, str]:
    """The environment of a program that uses ONNX Runtime."""
    found = library()
    if found is None:
        pytest.skip("the installed onnxruntime package has no shared library")
    return os.environ | {"GDPO_ONNXRUNTIME": str(found)}


@pytest.fixture(scope="session", params=["plain", pytest.param("sanitized", marks=pytest.mark.slow)])
def built(request, shared, compiler) -> Path:
    """The tests and the fuzzers: plain, and under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if request.param == "plain":
        return request.getfixturevalue("installed").with_name("csrc-plain")
    cuda = find_nvcc() is not None
    settings = ("-DGDPO_TESTS=ON", "-DGDPO_SANITIZE=address,undefined", f"-DGDPO_CUDA={'ON' if cuda else 'OFF'}")
    targets = ("test_parts", "test_upscaler", "test_c_api", *FUZZERS, *(["test_cuda", "fake_cuda"] if cuda else []))
    return shared("asan", lambda out: build(out, *settings, targets=targets))


@pytest.fixture(scope="session")
def libfuzzer(shared, compiler) -> Path:
    """The fuzzers as Clang builds them: guided by what each input reaches, under both sanitizers."""
    names = ["clang", *(f"clang-{version}" for version in range(25, 13, -1))]
    clang = next(filter(None, map(shutil.which, names)), None) or pytest.skip("needs clang and its sanitizers")
    beside = Path(clang).with_name(Path(clang).name.replace("clang", "clang++"))
    probe = [beside, "-fsanitize=fuzzer,address,undefined", "-x", "c++", "-", "-o", os.devnull]
    source = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    if subprocess.run(probe, input=source, text=True, capture_output=True).returncode:
        pytest.skip(f"{beside} lacks its sanitizers (Debian: libclang-rt-dev)")
    chosen = (f"-DCMAKE_C_COMPILER={clang}", f"-DCMAKE_CXX_COMPILER={beside}")
    settings = ("-DGDPO_TESTS=ON", "-DGDPO_SANITIZE=address,undefined,fuzzer-no-link", "-DGDPO_CUDA=OFF")
    return shared("libfuzzer", lambda out: build(out, *chosen, *settings, "-DGDPO_WERROR=OFF", targets=FUZZERS))


@pytest.fixture(scope="session")
def tsan(shared, compiler) -> Path:
    """The threaded test, under ThreadSanitizer."""
    settings = ("-DGDPO_TESTS=ON", "-DGDPO_SANITIZE=thread")
    return shared("tsan", lambda out: build(out, *settings, targets=("test_threads", "test_parts")))


@pytest.fixture(scope="session")
def installed(shared, compiler) -> Path:
    """An installed package: what `cmake --install` leaves. csrc-plain, beside it, has the tests too."""

    def make(out: Path) -> None:
        kernels = ("-DGDPO_CUDA=ON", "-DGDPO_CUDA_ARCHITECTURES=90") if find_nvcc() else ("-DGDPO_CUDA=OFF",)
        settings = ("-DGDPO_TESTS=ON", *kernels)
        where = (f"-DCMAKE_INSTALL_PREFIX={out}", "-DCMAKE_INSTALL_LIBDIR=lib")
        build(out.with_name("csrc-plain"), *settings, *where)
        run(CMAKE, "--install", out.with_name("csrc-plain"))

    return shared("installed", make)
