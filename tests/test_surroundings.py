"""Every command in poor surroundings: success, or a line on stderr; never a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import COMMANDS
from tests.support.folders import model, write_folder

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "engine" / "data" / "tiny"
WORK = {  # what each is asked to do, in a folder with photos/, small/ and folder/; it may refuse
    "engine.upscale": "photos/0.png out.png --model folder",
    "engine.info": "folder",
    "engine.build": "folder --out out --backend onnxruntime",
    "engine.export": "model --out out",
    "gdpo.train": "naosd --data.folder=photos --output_dir=out --max_train_steps=1 --model.full=true --vsd_weight=0 "
    "--perceptual_weight=0 --data.crop_size=64 --model.block_out_channels=[8] --validation_images=1",
    "gdpo.prepare": "photos --out out --size 64",
    "gdpo.evaluate": "--lr small --hr photos --model folder --out out",
    "gdpo.merge": "model --out out",
    "gdpo.convert": f"{BUNDLED} --out out",
    "gdpo.assets": "no-such-asset",
    "gdpo.targets": "--data.folder=photos --output_dir=out",
    "gdpo.random_folder": "out",
    "engine.serve": "--model nowhere",
    "engine.app": "--model nowhere",
    "engine.bulk": "photos out --model nowhere",
    "gdpo.rewards": "serve no-such-reward",
    "gdpo.hub": "model --overwrite --license apache-2.0",
    "gdpo.degradation": "--in photos --pairs out",
}
REFUSE = ("gdpo.assets", "gdpo.targets", "gdpo.merge", "engine.serve", "engine.app", "engine.bulk", "gdpo.rewards")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shell(text: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    command = ["bash", "-c", text, sys.executable]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **more)


@pytest.mark.parametrize("module", COMMANDS)
def test_an_interrupt_during_imports_is_one_line(module, tmp_path):
    """The interrupt comes as the first heavy module is looked for."""
    for heavy in ("numpy", "torch", "yaml"):
        (tmp_path / heavy).mkdir()
        (tmp_path / heavy / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", module, *WORK.get(module, "folder").split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("module", [name for name in COMMANDS if name.startswith("gdpo") or name == "engine.export"])
def test_without_the_packages_of_an_extra_a_line_says_which(module, tmp_path):
    """As after `pip install .` alone."""
    for extra in ("torch", "onnx"):
        missing = f"raise ModuleNotFoundError({f'No module named {extra}'!r}, name={extra!r})"
        (tmp_path / f"{extra}.py").write_text(missing)
    (tmp_path / "photos").mkdir()
    line = f'"$0" -m {module} {WORK.get(module, "photos --out out")}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable], capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    said = done.stderr.splitlines()
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: "), done.stderr
    assert (
        "torch" not in said[0] or "needs torch, which is not installed; pip install 'gdpo-sr[train,export]'" in said[0]
    )


def test_an_interrupt_inside_exec_has_its_exit_code_too(tmp_path):
    """Python would end itself by the signal, after the last line: dataclasses and others use exec."""
    (tmp_path / "command.py").write_text(
        "import os, signal, time\nfrom engine.io import cli, early\nearly.leave_on_signals()\n"
        "cli.run(lambda: exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(9)'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "command"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


FEW = ("engine.upscale", "engine.serve", "gdpo.train", "gdpo.evaluate")  # the others start the same way


@pytest.mark.parametrize("module", [m if m in FEW else pytest.param(m, marks=pytest.mark.slow) for m in COMMANDS])
def test_help_into_a_closed_pipe_without_a_home_in_the_c_locale(module, tmp_path):
    text = f'unset HOME; ulimit -n 64; LANG=C LC_ALL=C "$0" -m {module} --help | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = shell(text, tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "usage:" in done.stdout and os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """photos/, small/, folder/ and model/."""
    work = tmp_path_factory.mktemp("given")
    for place, size in (("photos", 128), ("small", 32)):
        (work / place).mkdir()
        for i in range(2):
            grain = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(grain).resize((size, size)).save(work / place / f"{i}.png")
    write_folder(work / "folder", model())
    made = shell(f'"$0" -m gdpo.convert {BUNDLED} --out model', work)
    assert made.returncode == 0, made.stderr
    return work


POOR = [
    'unset HOME; ulimit -n 64; LANG=C LC_ALL=C {} < /dev/null | true; exit "${{PIPESTATUS[0]}}"',
    "HOME=/proc/nowhere XDG_CACHE_HOME= {} 2>&1 > /dev/full",
    "ulimit -v 250000; {}",
    "ulimit -v 900000; {}",
    "ulimit -v 3000000; {}",
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("module", WORK)
def test_work_in_poor_surroundings_is_done_or_ends_in_a_line(module, given):
    for number, poor in enumerate(POOR):
        subprocess.run(["rm", "-rf", given / "out", given / "out.png"], check=True)
        done = shell(
            poor.replace("{}", f'"$0" -m {module} {WORK[module]}').replace("{{", "{").replace("}}", "}"), given
        )
        said = done.stderr + done.stdout
        assert "Traceback" not in said and done.returncode in (0, 1, 2), f"{poor}: exit {done.returncode}\n{said}"
        assert done.returncode == 0 or any(word in said for word in ("error: ", "failed", "failure")), (
            f"{poor}: exit {done.returncode}\n{said}"
        )
        expected = module not in REFUSE
        assert done.returncode == 0 or not expected or number > 0, f"{poor}: exit {done.returncode}\n{said}"
