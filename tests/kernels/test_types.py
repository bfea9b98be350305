"""Type checkers see the kernels as they are, though `gdpo.kernels` resolves its names at run time."""

import re
import subprocess
import sys
from pathlib import Path

import gdpo.kernels

ROOT = Path(__file__).resolve().parents[2]


def test_a_wrong_call_is_a_type_error(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from gdpo.kernels import attribute_ratios, gdpo_loss\n"
        "gdpo_loss(1, 2, 3, nonsense=4)\n"
        "smooth, texture, mask = attribute_ratios(torch.zeros(1, 64, 64), threshold=50.0)\n"
        "reveal_type(mask)\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", program],  # as lint does: one cache
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in found.stdout.splitlines() if "program.py" in line]
    assert [line for line in lines if ":3: error:" in line and 'argument "nonsense" for "gdpo_loss"' in line], lines
    assert [line for line in lines if ':3: error: Argument 1 to "gdpo_loss" has incompatible type "int"' in line], lines
    assert [line for line in lines if ':5: note: Revealed type is "torch._tensor.Tensor"' in line], lines
    assert not [line for line in lines if ":2: error" in line or ":4: error" in line], lines


def test_the_stub_has_every_name():
    stub = (ROOT / "gdpo" / "kernels.pyi").read_text()
    names = re.findall(r"^from kernels\.(\w+) import (\w+) as \2$", stub, re.MULTILINE)
    assert {name: module for module, name in names} == gdpo.kernels._HOME
