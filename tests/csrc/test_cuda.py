"""The CUDA kernels of csrc/ without a GPU: what nvcc makes of them, and the code around them with a stand-in driver."""

import hashlib
import os
import re
import subprocess

import numpy as np
import pytest

from engine.runtime.manifest import Geometry, Graph, Manifest, Profile, Tensor
from tests.support.cpp import CMAKE, ROOT, build, run
from tests.support.folders import write_ppm

SRC = ROOT / "csrc" / "src"
SOURCE = SRC / "devices" / "cuda" / "kernels.cu"
KERNELS = re.findall(r"X\(\w+, (gdpo_\w+)\)", (SOURCE.parent / "kernels.hpp").read_text()) + ["gdpo_sums"]
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", f"-I{SRC}"]  # as cmake/cuda.cmake has them


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)],
)
def test_kernels_compile_without_warnings_and_spill_nothing(nvcc, architecture, tmp_path):
    out = tmp_path / "kernels.cubin"
    said = run(nvcc, *FLAGS, "-Xptxas", "-v", "-cubin", f"-arch={architecture}", SOURCE, "-o", out)
    found = re.findall(
        rf"Compiling entry function '(\w+)' for '{architecture}'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert sorted(name for name, *_ in found) == sorted(KERNELS) and len(KERNELS) == 12, said
    for name, *memory, registers in found:
        assert memory == ["0", "0", "0"] and int(registers) <= 64, (name, memory, registers)
    assert out.read_bytes()[:4] == b"\x7fELF"


def arithmetic(nvcc, tmp_path, *flags) -> set[str]:
    """The floating-point instructions and the atomics of the PTX."""
    run(nvcc, *flags, "-ptx", "-arch=compute_80", SOURCE, "-o", tmp_path / "kernels.ptx")
    words = re.findall(r"^\s+(?:@\S+\s+)?([a-z][\w.:]*)", (tmp_path / "kernels.ptx").read_text(), re.MULTILINE)
    exact = ("ld.", "st.", "mov.", "selp.", "setp.", "cvt.")
    return {w for w in words if (re.search(r"\.f(16|32|64)", w) and not w.startswith(exact)) or re.match("atom|red", w)}


def test_every_sum_and_product_is_rounded_as_on_the_cpu(nvcc, tmp_path):
    """ptxas fuses only what does not say how it is rounded: with .rn everywhere the bits are those of the CPU."""
    allowed = {f"{op}.rn.{kind}" for op in ("add", "sub", "mul", "div") for kind in ("f32", "f64")} | {"sqrt.rn.f64"}
    sums = {"atom.global.add.u64", "red.global.add.u64"}  # of integers: any order gives the same
    found = arithmetic(nvcc, tmp_path, *FLAGS)
    assert found - allowed - sums == set() and {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f64"} <= found and found & sums
    careless = arithmetic(nvcc, tmp_path, *(flag for flag in FLAGS if flag != "-fmad=false"))
    assert {"fma.rn.f32", "fma.rn.f64"} <= careless - allowed


def test_a_picture_on_the_gpus_way_has_the_bytes_of_the_cpus(nvcc, built):
    """fake_cuda.cpp runs the kernels' functions on the CPU."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(built / "tests" / "fake")}
    assert "ok   every_request_has_the_bytes_of_the_cpu" in run(built / "tests" / "test_cuda", env=environment)


def test_no_cuda_library_is_needed_to_load_it(nvcc, built):
    """The library with kernels in it is what the other tests of this folder run, where no GPU is."""
    for program in ("test_upscaler", "test_cuda"):
        needed = run("readelf", "-d", built / "tests" / program)
        assert "NEEDED" in needed and "cuda" not in needed and "nvinfer" not in needed


@pytest.mark.parametrize(
    "settings, rc, message",
    [
        (["-DGDPO_CUDA=auto"], 0, "CUDA kernels: left out (only the TensorRT backend uses them"),
        (["-DGDPO_CUDA=OFF"], 0, "CUDA kernels: left out (GDPO_CUDA=OFF)"),
        (["-DGDPO_CUDA=ON"], 0, "for sm_80 sm_90 sm_100"),
        (["-DGDPO_CUDA=ON", "-DGDPO_NVCC="], 1, "GDPO_CUDA=ON: nvcc or the CUDA toolkit's cuda.h"),
        (["-DGDPO_CUDA=yes"], 1, "GDPO_CUDA must be auto, ON or OFF; got yes"),
    ],
    ids=["auto", "off", "on", "without", "wrong"],
)
def test_the_configuration_says_what_becomes_of_the_kernels(compiler, nvcc, tmp_path, settings, rc, message):
    own = [f"-DGDPO_JSON_INCLUDE={tmp_path}", "-DTENSORRT_ROOT="]
    command = [CMAKE, "-S", ROOT / "csrc", "-B", tmp_path, *own, *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == bool(rc) and message in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    "choice, known, rc, message",
    [
        ("auto", "compute_75 compute_80 compute_90", 0, "nvcc for sm_80 sm_90"),
        ("ON", "compute_75 compute_80 compute_90", 0, "nvcc for sm_80 sm_90"),
        ("auto", "compute_52 compute_1000", 0, "left out ({nvcc} --list-gpu-arch names none of 80;90;100)"),
        ("auto", "", 0, "left out ({nvcc} --list-gpu-arch names none"),
        ("ON", "", 1, "GDPO_CUDA=ON: {nvcc} --list-gpu-arch names none of 80;90;100; take a newer CUDA toolkit"),
    ],
    ids=["auto", "on", "old", "broken", "insist"],
)
def test_an_nvcc_that_does_not_know_every_gpu_breaks_nothing(compiler, tmp_path, choice, known, rc, message):
    """With empty headers and a script for nvcc: nothing is compiled."""
    for name in ("cuda.h", "cuda_runtime_api.h", "NvInferRuntime.h"):
        (tmp_path / name).touch()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {known}\nexit {int(not known)}\n")
    nvcc.chmod(0o755)
    places = {"GDPO_JSON_INCLUDE": tmp_path, "GDPO_CUDA_INCLUDE": tmp_path, "GDPO_TENSORRT_INCLUDE": tmp_path}
    settings = places | {"TENSORRT_ROOT": tmp_path, "GDPO_NVCC": nvcc, "GDPO_CUDA": choice}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    command = [CMAKE, "-S", ROOT / "csrc", "-B", tmp_path / "build", *defines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode != 0) == bool(rc) and message.format(nvcc=nvcc) in said
    generate = "".join(f.read_text() for f in (tmp_path / "build").rglob("build.make"))
    assert ("compute_90,code=compute_90" in generate) == ("sm_90" in message) and "compute_100" not in generate


@pytest.fixture(scope="session")
def tensorrt(shared, compiler, nvcc):
    """The tool with the TensorRT backend, and the stand-ins for libcuda and libnvinfer."""
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("needs TENSORRT_ROOT: the headers of TensorRT 10 or 11")
    settings = ("-DGDPO_TESTS=ON", "-DGDPO_SANITIZE=address", f"-DTENSORRT_ROOT={root}")
    return shared("tensorrt", lambda out: build(out, *settings, targets=("gdpo_tool", "fake_cuda", "fake_nvinfer")))


@pytest.mark.parametrize(
    "choice, usual",
    [(["--tile", "96"], False), (["--color", "wavelet"], True), (["--tile", "40", "--scale", "3"], False)],
    ids=["one", "usual", "x3"],
)
def test_the_tensorrt_backend_runs_with_the_kernels_and_without(tensorrt, tmp_path, choice, usual):
    """The same bytes when tiles stay on the device, when they come from the CPU, and from recorded graphs. Tiles of the
    usual shape, of 96 output pixels, take the plan's second profile."""
    plan = b"fake"
    inputs = (
        Tensor("image", ("batch", 3, "height", "width")),
        Tensor("noise", ("batch", 48, "latent_height", "latent_width")),
    )
    output = Tensor("output", ("batch", 3, "height", "width"))
    graph = Graph("generator.plan", hashlib.sha256(plan).hexdigest(), inputs, output)
    geometry = Geometry(scale=4, factor=4, channels=48, multiple=16, overlap=64)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / graph.file).write_bytes(plan)
    options = {"version_compatible": True}  # with any version of TensorRT; the stand-in's GPU is an sm_99
    Manifest(
        "tensorrt", "10.0.0", "fp32", geometry, Profile((1, 1, 8), (64, 96, 1024)), {"generator": graph},
        options=options, architecture="sm_99",
    ).save(folder)  # fmt: skip
    write_ppm(tmp_path / "in.ppm", np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    fake = tensorrt / "tests" / "fake"
    environment = os.environ | {"LD_LIBRARY_PATH": str(fake), "GDPO_TENSORRT": str(fake / "libfake_nvinfer.so")}
    made = {}
    for name, free in [("kernels", str(2**32)), ("cpu", "0")]:
        said = run(
            tensorrt / "gdpo-upscale-cpp",
            *(folder, tmp_path / "in.ppm", tmp_path / f"{name}.ppm", "--trust-plan", "--no-progress", *choice),
            env=environment | {"FAKE_CUDA_FREE": free, "FAKE_CUDA_REPORT": "1"},
        )
        launches, replays, live = map(int, re.search(r"launches=(\d+) replays=(\d+) live=(-?\d+)", said).groups())
        assert (launches > 0) == (name == "kernels") and (replays > 1) == ("96" not in choice) and live == 0, said
        assert said.count("profile=1") == usual, said
        made[name] = (tmp_path / f"{name}.ppm").read_bytes()
    assert made["kernels"] == made["cpu"] and len(set(made["cpu"])) > 200
