"""A deployment is small: the run time needs neither torch nor diffusers nor gdpo, and imports little."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCKED = ("torch", "diffusers", "transformers", "gdpo", "onnx", "scipy", "skimage", "matplotlib", "cv2")

UPSCALE = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is not installed in this environment")
sys.meta_path.insert(0, Blocker())
from engine import upscale
sys.argv = ["upscale", *sys.argv[1:]]
upscale.console()
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_upscaling_works_where_torch_and_the_rest_are_not_installed(tiny_engine, photo, tmp_path):
    from engine.io.images import Picture, read_image, write_image

    write_image(tmp_path / "in.tif", Picture(photo[:20, :20].copy()))
    done = python(UPSCALE, tmp_path / "in.tif", tmp_path / "out.png", "--model", tiny_engine)
    assert done.returncode == 0, done.stderr
    assert read_image(tmp_path / "out.png").pixels.shape == (80, 80, 3)
    missing = python(UPSCALE, tmp_path / "in.tif", tmp_path / "b.png", "--model", tiny_engine, "--backend", "torch")
    assert missing.returncode == 2 and "is not installed in this" in missing.stderr  # the blocker does block
    assert "backend torch is not installed here" in missing.stderr and "pip install 'gdpo-sr[export]'" in missing.stderr


def test_the_run_time_starts_with_numpy_alone():
    """Codecs, ONNX Runtime and the C++ core are imported by the first picture or model that needs them."""
    code = """
import sys
from engine import Upscaler
roots = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in roots if not name.startswith(("_", "engine"))))
"""
    done = python(code)
    assert done.stdout.strip() == "['numpy']", done.stderr


def test_importing_the_package_loads_nothing():
    done = python(
        "import sys, engine; print([m for m in ('numpy', 'onnxruntime', 'PIL', 'torch') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]"


def test_a_generator_is_imported_without_the_compiler_of_torch():
    """torch._dynamo takes two seconds, at the start of every command that reads a model folder."""
    done = python("import sys, gdpo.generator, gdpo.merge; print('torch._dynamo.convert_frame' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_onnx_runtime_reports_nothing_to_its_maker(tmp_path):
    """With a home of its own, and none of the variables by which ONNX Runtime knows a test."""
    code = "import numpy, engine; engine.Upscaler.load(core={core}).upscale(numpy.zeros((8, 8, 3), numpy.uint8))"
    for core in (True, False) if importlib.util.find_spec("engine._core") else (False,):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", code.format(core=core)]
        subprocess.run(command, check=True, cwd=ROOT, env=env, timeout=120)
        assert list(tmp_path.rglob("*")) == []
