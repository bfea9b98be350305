"""The C++ library built and run: its own tests under the sanitizers, the installed package, the tools."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import Upscaler
from tests.support import faulty
from tests.support.cpp import CMAKE, ROOT, build, run
from tests.support.folders import write_ppm

REGRESSIONS = ROOT / "tests" / "csrc" / "regressions"


def read_ppm(path: Path) -> np.ndarray:
    _, size, largest, samples = path.read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(samples, np.uint8 if largest == b"255" else ">u2").reshape(height, width, 3)


def test_the_parts(built):
    assert "FAIL" not in run(built / "tests" / "test_parts")


def test_the_upscaler(built, folders, runtime):
    run(built / "tests" / "test_upscaler", folders, env=runtime)


def test_the_c_interface(built, folders, runtime):
    assert "0 failures" in run(built / "tests" / "test_c_api", folders / "plain", env=runtime)


@pytest.mark.slow
def test_threads_are_clean_under_the_thread_sanitizer(tsan, folders, runtime):
    run(tsan / "tests" / "test_parts")
    environment = runtime | {"TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'csrc' / 'tsan.supp'}"}
    assert "8 pictures as expected, 2 cancelled" in run(tsan / "tests" / "test_threads", folders, env=environment)


def seeds_of(target: str, folders: Path) -> list[Path]:
    """Good files, and earlier findings."""
    good = {
        "manifest": [folders / "plain" / "manifest.json"],
        "ppm": [folders / "in.ppm"],
        "views": [folders / "plain" / "manifest.sha256", folders / "in.ppm"],
        "folder": [folders / "plain" / "generator.onnx", folders / "inputs" / "generator.onnx"],
    }[target]
    return good + sorted((REGRESSIONS / target).glob("*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["manifest", "ppm", "views", "folder"])
def test_libfuzzer_finds_nothing(libfuzzer, folders, runtime, target, tmp_path):
    """GDPO_FUZZ_SECONDS a target (600 for a release)."""
    seconds = int(os.environ.get("GDPO_FUZZ_SECONDS", "20"))
    (tmp_path / "corpus").mkdir()
    for number, seed in enumerate(seeds_of(target, folders)):
        shutil.copy(seed, tmp_path / "corpus" / str(number))
    environment = runtime | {"GDPO_FUZZ_FOLDER": str(folders / "plain"), "TMPDIR": str(tmp_path)}
    limits = (f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096", "-seed=1", "-print_final_stats=1")
    said = run(libfuzzer / "tests" / f"fuzz_{target}", *limits, "corpus", cwd=tmp_path, env=environment)
    assert "stat::number_of_executed_units" in said
    print(f"{target}: {said[said.index('stat::number') :].splitlines()[0]}")


@pytest.mark.parametrize("seconds", [2, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["manifest", "ppm", "views", "folder"])
def test_foreign_bytes_end_in_a_typed_error(built, folders, runtime, target, seconds, tmp_path):
    """Earlier findings first, then mutants of good files."""
    seeds = seeds_of(target, folders)
    environment = runtime | {"GDPO_FUZZ_FOLDER": str(folders / "plain"), "TMPDIR": str(tmp_path)}
    program = built / "tests" / f"fuzz_{target}"
    run(program, seconds, 1, *seeds, cwd=tmp_path, env=environment)


@pytest.fixture(scope="module")
def example(installed, tmp_path_factory) -> Path:
    """examples/cpp, built outside the tree against the installed package."""
    out = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples" / "cpp", out / "source")
    run(CMAKE, "-S", out / "source", "-B", out / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run(CMAKE, "--build", out / "build")
    return out / "build" / "upscale"


def test_a_program_outside_the_tree_finds_the_package_and_runs(example, folders, runtime, tmp_path):
    run(example, folders / "plain", folders / "in.ppm", tmp_path / "out.ppm", env=runtime)
    expected = Upscaler.load(folders / "plain", core=False).upscale(read_ppm(folders / "in.ppm"))
    assert np.array_equal(read_ppm(tmp_path / "out.ppm"), expected)
    command = [example, folders / "stale", folders / "in.ppm", tmp_path / "x.ppm"]
    done = subprocess.run(command, capture_output=True, text=True, env=runtime)
    assert done.returncode == 1 and "is not the manifest's" in done.stderr and not (tmp_path / "x.ppm").exists()


def test_pkg_config_links_shared_and_static(installed, folders, runtime, tmp_path):
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    environment = runtime | {"PKG_CONFIG_PATH": str(installed / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "gdpo", env=environment).split()
    compiler, source = os.environ.get("CXX", "c++"), ROOT / "examples" / "cpp" / "upscale.cpp"
    run(compiler, "-std=c++17", source, *flags, f"-Wl,-rpath,{installed}/lib", "-o", tmp_path / "shared")
    static = run("pkg-config", "--cflags", "--libs", "--static", "gdpo", env=environment).split()
    static = [str(installed / "lib" / "libgdpo.a") if flag == "-lgdpo" else flag for flag in static]
    run(compiler, "-std=c++17", source, *static, "-o", tmp_path / "static")
    for program in ("shared", "static"):
        run(tmp_path / program, folders / "plain", folders / "in.ppm", tmp_path / f"{program}.ppm", env=runtime)
    assert (tmp_path / "shared.ppm").read_bytes() == (tmp_path / "static.ppm").read_bytes()
    assert b"libgdpo" not in subprocess.run(["ldd", tmp_path / "static"], capture_output=True).stdout


def test_the_shared_library_exports_its_interface_only(installed):
    names = run("nm", "-D", "--defined-only", "-C", installed / "lib" / "libgdpo.so")
    symbols = [line.split(maxsplit=2)[2] for line in names.splitlines()]
    assert any(s.startswith("gdpo::Upscaler::upscale") for s in symbols) and "gdpo_load" in symbols
    assert not [s for s in symbols if "gdpo::detail" in s or "nlohmann" in s]


def test_the_tool_upscales_and_names_what_is_wrong(installed, folders, runtime, tmp_path):
    tool = installed / "bin" / "gdpo-upscale-cpp"
    out = tmp_path / "out.ppm"
    run(tool, folders / "plain", folders / "in.ppm", out, "--seed", "7", "--tile", "24", "--no-progress", env=runtime)
    assert out.read_bytes() == (folders / "expected-tiled.ppm").read_bytes()
    assert "usage:" in run(tool, "--help")
    deep = np.random.default_rng(0).integers(0, 65536, (10, 12, 3)).astype(">u2")
    (tmp_path / "deep.ppm").write_bytes(b"P6\n12 10\n65535\n" + deep.tobytes())
    run(tool, folders / "plain", tmp_path / "deep.ppm", tmp_path / "deep4.ppm", "--no-progress", env=runtime)
    expected = Upscaler.load(folders / "plain", core=False).upscale(deep.astype(np.uint16))
    assert np.array_equal(read_ppm(tmp_path / "deep4.ppm"), expected)
    write_ppm(tmp_path / "in.ppm", np.zeros((20, 20, 3), np.uint8))
    for arguments, message in [
        ([], "FOLDER, IN and OUT are needed"),
        (["F", "a.bmp", "b.ppm"], "unknown kind of picture"),
        ([folders / "plain", "nowhere.ppm", "b.ppm"], "nowhere.ppm"),
        ([folders / "plain", tmp_path / "in.ppm", "b.ppm", "--tile", "x"], "--tile needs a number"),
        ([folders / "plain", tmp_path / "in.ppm", "b.ppm", "--tile", "3"], "tile must be 16 to 256"),
        ([folders / "plain", tmp_path / "in.ppm", "b.ppm", "--frobnicate"], "unknown"),
        ([folders / "plain", tmp_path / "in.ppm", "in.ppm"], "OUT is the input itself"),
    ]:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=runtime, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "b.ppm").exists(), message


@pytest.mark.parametrize("kind", ["full", "short", "lost"])
@pytest.mark.parametrize("suffix", [".ppm", ".png"])
def test_the_tool_leaves_no_half_file_on_a_bad_disk(installed, folders, runtime, tmp_path, suffix, kind):
    if faulty.missing():
        pytest.skip(faulty.missing())
    picture, out = tmp_path / f"in{suffix}", tmp_path / "disk" / f"out{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(picture)
    command = [installed / "bin" / "gdpo-upscale-cpp", folders / "plain", picture, out, "--no-progress"]
    out.parent.mkdir()
    run(*command, env=runtime)
    good, library, failed = out.read_bytes(), faulty.build(tmp_path), 0
    for at in range(1, 5):  # the file, its only write, the flush, the rename
        bad = runtime | faulty.environment(library, out.parent, kind, at)
        done = subprocess.run(command, capture_output=True, text=True, env=bad)
        failed += done.returncode != 0
        assert done.returncode == 0 or str(out) in done.stderr, done.stderr
        assert [p.name for p in out.parent.iterdir()] == [out.name] and out.read_bytes() == good
    assert failed == (2 if kind == "lost" else 4)


def test_every_source_is_formatted():
    formatter = shutil.which("clang-format", path=Path(CMAKE).parent) or shutil.which("clang-format")
    if formatter is None:
        pytest.skip("needs clang-format (pip install clang-format)")
    folders = ("csrc", "tests/csrc", "examples/cpp", "kernels")
    kinds = {".cpp", ".hpp", ".h", ".c", ".cu", ".cuh"}
    sources = [f for folder in folders for f in sorted((ROOT / folder).rglob("*")) if f.suffix in kinds]
    run(formatter, "--dry-run", "-Werror", f"--style=file:{ROOT / '.clang-format'}", *sources)


def test_the_tensorrt_backend_compiles_with_warnings_as_errors(compiler, tmp_path):
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("needs TENSORRT_ROOT: the headers of TensorRT 10 or 11 (and CUDA_HOME: the CUDA toolkit's)")
    build(tmp_path, f"-DTENSORRT_ROOT={root}", targets=("gdpo_shared",))
