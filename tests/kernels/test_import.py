"""`gdpo.kernels` beside Hugging Face's package `kernels`: uninstalled, editable and as a wheel; without Triton too."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HF_KERNELS = "kernels==0.17.2"

LOOK = """
import json, sys
if sys.argv[1] == "uninstalled":  # as if `pip install -e .` had not run: only the working folder has the code
    sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import gdpo.kernels
light = not {"torch", "triton", "numpy"} & sys.modules.keys()
from transformers import CLIPTextModel
from diffusers import UNet2DConditionModel
from diffusers.utils import is_kernels_available
import importlib.util, torch
from gdpo.kernels import attribute_reward
ones = torch.ones(1)
advantage = attribute_reward(torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 2, 0), ones, ones)
spec = importlib.util.find_spec("kernels")
print(json.dumps({
    "light": light, "gdpo": gdpo.__file__, "ours": sys.modules["gdpo.kernels.reward"].__file__,
    "theirs": spec and spec.origin, "available": is_kernels_available(), "advantage": advantage.tolist(),
}))
"""


def look(layout: str, folder: Path, *paths: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-c", LOOK, layout], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["light"], "importing gdpo.kernels must load neither torch nor triton"
    assert seen["advantage"] == [[pytest.approx(-(0.5**0.5)), pytest.approx(0.5**0.5)]]
    return seen


@pytest.fixture(scope="module")
def hf_kernels(tmp_path_factory) -> Path:
    """A folder with Hugging Face's package, as pip installs it."""
    folder = tmp_path_factory.mktemp("hf")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--target", folder,
         HF_KERNELS],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {HF_KERNELS} here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder with this project's wheel unpacked, as pip does; built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gdpo", "kernels", "engine"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    site = folder / "site"
    with zipfile.ZipFile(folder / done.stdout.splitlines()[-1]) as archive:
        assert not [n for n in archive.namelist() if n.startswith("kernels/")]  # it would shadow theirs
        archive.extractall(site)
    return site


def test_uninstalled_from_the_root(hf_kernels):
    seen = look("uninstalled", ROOT, hf_kernels)
    assert Path(seen["gdpo"]) == ROOT / "gdpo" / "__init__.py" and Path(seen["ours"]) == ROOT / "kernels" / "reward.py"
    assert Path(seen["theirs"]).is_relative_to(hf_kernels) and seen["available"]


@pytest.mark.slow
def test_uninstalled_from_the_root_without_theirs():
    seen = look("uninstalled", ROOT)
    assert Path(seen["ours"]) == ROOT / "kernels" / "reward.py" and not seen["available"]


@pytest.mark.slow
def test_editable_from_elsewhere(hf_kernels, tmp_path):
    seen = look("editable", tmp_path, hf_kernels)
    assert Path(seen["ours"]) == ROOT / "kernels" / "reward.py"
    assert Path(seen["theirs"]).is_relative_to(hf_kernels) and seen["available"]


@pytest.mark.slow
def test_wheel_from_elsewhere(wheel, hf_kernels, tmp_path):
    seen = look("wheel", tmp_path, wheel, hf_kernels)
    assert Path(seen["ours"]) == wheel / "gdpo" / "_kernels" / "reward.py"
    assert Path(seen["theirs"]).is_relative_to(hf_kernels) and seen["available"]


def test_without_triton(tmp_path):
    """Mac, Windows: the definitions run, and backend="triton" says what is missing."""
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from gdpo.kernels import attribute_ratios, attribute_reward, attribute_statistics, gdpo_loss
x = torch.rand(2, 2, 3, 20, 20)
smooth, texture, mask = attribute_ratios(x[:, 0, 0])
scores = attribute_statistics(x, x[:, 0], mask)
advantage = attribute_reward(scores.psnr_y[..., None], scores.detail[..., None], smooth, texture)
gdpo_loss(x.requires_grad_(), x.detach(), x.detach(), advantage)[0].backward()
try:
    attribute_ratios(x[:, 0, 0].detach(), backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Triton is not installed: pip install triton" in done.stdout
