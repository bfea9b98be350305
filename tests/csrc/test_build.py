"""setup.py and GDPO_BUILD_CSRC where the C++ library cannot be built."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support.cpp import ROOT


def build(tmp_path, choice: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext` with a compiler that fails, beside the tree."""
    out = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *out]
    environment = os.environ | {"GDPO_BUILD_CSRC": choice, "CXX": "/bin/false", "CC": "/bin/false"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def test_auto_says_in_one_line_that_python_runs(compiler, tmp_path):
    done = build(tmp_path, "auto")
    lines = [line for line in done.stdout.splitlines() if "engine._core" in line]
    assert done.returncode == 0 and len(lines) == 1
    assert "left out, the engine runs in Python" in lines[0] and not list(tmp_path.rglob("_core*"))


def test_asked_for_it_fails_and_shows_why(compiler, tmp_path):
    done = build(tmp_path, "1")
    assert done.returncode != 0 and "is not able to compile a simple test program" in done.stdout + done.stderr


def test_left_out_nothing_is_tried(tmp_path):
    done = build(tmp_path, "0")
    assert done.returncode == 0 and "engine._core" not in done.stdout + done.stderr


@pytest.mark.parametrize("choice", ["yes", ""])
def test_another_choice_is_named(choice, tmp_path):
    done = build(tmp_path, choice)
    assert done.returncode != 0 and "GDPO_BUILD_CSRC must be auto, 1 or 0" in done.stderr


def source_tree(out) -> None:
    """What a build needs, without what was built."""
    out.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, out)
    for name in ("gdpo", "kernels", "engine", "csrc"):
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_built_in_isolation_runs_in_an_environment_of_its_own(tmp_path):
    """sdist, wheel from the sdist, `pip install` of that, `engine.upscale` from another folder."""
    source_tree(tmp_path / "source")
    command = [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", tmp_path / "source"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"GDPO_BUILD_CSRC": "0"}
    pinned = environment | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    done = subprocess.run(command, capture_output=True, text=True, env=pinned, timeout=600)
    if "No matching distribution" in done.stdout + done.stderr:
        pytest.skip("needs a package index")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    wheel = next((tmp_path / "dist").glob("*.whl"))
    own = tmp_path / "own" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "own"], check=True, timeout=120)
    subprocess.run([own, "-m", "pip", "install", "-q", wheel], check=True, env=pinned, timeout=600)
    (tmp_path / "elsewhere").mkdir()
    code = "from PIL import Image; Image.new('RGB', (16, 16), 'teal').save('a.png')"
    for arguments in (["-c", code], ["-m", "engine.upscale", "a.png", "b.png"]):
        subprocess.run([own, *arguments], cwd=tmp_path / "elsewhere", check=True, env=environment, timeout=120)
    assert (tmp_path / "elsewhere" / "b.png").stat().st_size > 100


@pytest.mark.slow
def test_the_wheel_contains_the_compiled_module(compiler, tmp_path):
    """Through a source distribution, which must hold all that the build needs."""
    source_tree(tmp_path / "source")
    code = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def make(what, source):
        environment = os.environ | {"GDPO_BUILD_CSRC": "1"}
        command = [sys.executable, "-c", code, what, tmp_path]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return tmp_path / done.stdout.splitlines()[-1]

    sdist = make("build_sdist", tmp_path / "source")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    wheel = make("build_wheel", tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "engine/_core.pyi" in names and [n for n in names if n.startswith("engine/_core.c") and n.endswith(".so")]
    command = [sys.executable, "-c", "import engine._core as c; print(c.philox((0,) * 4, 0)[0], c.__file__)"]
    done = subprocess.run(command, cwd=tmp_path / "site", capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(0x6627E8D5), str(next((tmp_path / "site" / "engine").glob("_core.c*.so")))]
