"""The examples of examples/programs: Rust, Go and Node over the C interface, and Node over the events."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import Upscaler
from engine.runtime.upscaler import default_model
from tests.support.cpp import ROOT, run

EXAMPLES = ROOT / "examples" / "programs"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A PPM file, and what Python makes of it."""
    from skimage import data

    rgb = data.chelsea()[60:90, 100:150].copy()
    file = tmp_path_factory.mktemp("pictures") / "in.ppm"
    Image.fromarray(rgb).save(file)
    return file, Upscaler.load().upscale(rgb)


@pytest.fixture(scope="module")
def environment(installed, runtime) -> dict[str, str]:
    folders = {"LD_LIBRARY_PATH": installed / "lib", "PKG_CONFIG_PATH": installed / "lib" / "pkgconfig"}
    return runtime | {name: str(folder) for name, folder in folders.items()}


def compiled(language: str, out: Path, installed: Path, environment: dict[str, str]) -> list[str]:
    """The command that runs an example."""
    if language == "rust":
        rustc = shutil.which("rustc") or pytest.skip("needs rustc")
        run(rustc, "--edition", "2021", EXAMPLES / "upscale.rs", "-L", installed / "lib", "-o", out / "upscale")
        return [str(out / "upscale")]
    if language == "go":
        go = shutil.which("go") or pytest.skip("needs Go")
        if not shutil.which("pkg-config"):
            pytest.skip("needs pkg-config")
        caches = {"GOCACHE": str(out / "cache"), "GOPATH": str(out / "go"), "GOFLAGS": ""}
        run(go, "build", "-o", out / "upscale", EXAMPLES / "upscale.go", cwd=out, env=environment | caches)
        return [str(out / "upscale")]
    node = shutil.which("node") or pytest.skip("needs Node")
    if not (EXAMPLES / "node_modules").is_dir():
        pytest.skip("needs examples/programs/node_modules (make web)")
    return [node, str(EXAMPLES / "upscale.mjs")]


@pytest.mark.parametrize("language", ["rust", "go", "node"])
def test_the_c_interface(language, installed, environment, pictures, tmp_path):
    command = compiled(language, tmp_path, installed, environment)
    own = environment | {"GDPO_LIBRARY": str(installed / "lib" / "libgdpo.so")}
    source, expected = pictures
    run(*command, default_model(), source, tmp_path / "out.ppm", env=own)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.ppm")), expected)

    bad = [*command, str(tmp_path / "nowhere"), str(source), str(tmp_path / "never.ppm")]
    done = subprocess.run(bad, env=own, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "no such folder" in done.stderr and not (tmp_path / "never.ppm").exists()


def test_events_from_node(pictures, tmp_path):
    node = shutil.which("node") or pytest.skip("needs Node")
    command = tmp_path / "gdpo-upscale"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m engine.upscale "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"GDPO_UPSCALE": str(command)}

    def follow(*arguments) -> subprocess.CompletedProcess:
        values = [node, str(EXAMPLES / "events.mjs"), *map(str, arguments)]
        return subprocess.run(values, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    source, expected = pictures
    done = follow(source, tmp_path / "out.png")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines() == [f"100% {source}", f"written: {tmp_path / 'out.png'}"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)

    done = follow(source, tmp_path / "missing.png", tmp_path / "out")  # one of two fails
    assert done.returncode == 1 and f"failed: {tmp_path / 'missing.png'}: No such file" in done.stdout
    done = follow(source)  # no output
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
