"""Builds of csrc/ for tests."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def run(*command, **options) -> str:
    """What a command prints; where it fails, that is shown."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}"
    return done.stdout


def build(out: Path, *settings: str, targets: tuple[str, ...] = ()) -> None:
    """Configure and build csrc/ in a folder, quickly: little optimisation, few compiler runs."""
    json = Path(importlib.util.find_spec("nlohmann_json").origin).parent / "include"
    fast = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
    unity = ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"]
    own = [f"-DGDPO_JSON_INCLUDE={json}", "-DTENSORRT_ROOT=", "-DGDPO_WERROR=ON"]
    run(CMAKE, "-S", ROOT / "csrc", "-B", out, *fast, *unity, *own, *settings)
    run(CMAKE, "--build", out, *(["--target", *targets] if targets else []))
