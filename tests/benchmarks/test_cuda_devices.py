"""What only runs on CUDA, run on tensors without data: devices and types must fit, and the host must not wait."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # minutes: a step and a picture, operation by operation

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["attribute_reward_fwd", "attribute_statistics_fwd", "attribute_statistics_reduce", "complexity_fwd",
           "gdpo_loss_bwd", "gdpo_loss_fwd", "gdpo_loss_reduce", "geglu_bwd", "geglu_fwd", "group_norm_apply",
           "group_norm_partial", "group_norm_reduce", "group_norm_small", "ratios_fwd"]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if torch.version.cuda or sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("for a Linux machine whose torch has no CUDA, with g++")
    library, at = tmp_path_factory.mktemp("fake-cuda") / "fake_cuda.so", Path(torch.__file__).parent
    source = ROOT / "tests" / "benchmarks" / "fake_cuda.cpp"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", source, f"-I{at}/include", f"-L{at}/lib", "-ltorch_cpu",
               "-lc10", f"-Wl,-rpath,{at}/lib", "-o", library]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    pinned = f"torch=={torch.__version__.partition('+')[0]}\n" in (ROOT / "constraints.txt").read_text()
    if made.returncode and not pinned:
        pytest.skip(f"the interfaces of torch {torch.__version__} are others: {made.stderr[:300]}")
    assert made.returncode == 0, made.stderr
    return library


def run(library: Path, *arguments: object, module: str = "fake_cuda"):
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(library, mini_sd) -> dict:
    return run(library, mini_sd)


def test_a_gdpo_step_mixes_no_devices_and_no_types(report):
    assert report["kernels"] == [f"_{name}_kernel" for name in KERNELS]
    assert report["places"] == ["cuda:0"] and not report["mixed"]


def test_within_a_gdpo_step_the_host_waits_for_the_check_of_the_rewards_alone(report):
    # The prompt is copied in the first step alone, and the benchmark reads the loss.
    first, read = {"gdpo/model/prompts.py:__call__": 1}, {"benchmarks/gdpo_step.py:step": 1}
    for name, elsewhere in (("waits", first | read), ("waits, dpo", first), ("waits, tiny", {})):
        waits = {place: n for place, n in report[name].items() if not place.startswith("gdpo/degradation/")}
        assert waits == {"gdpo/scores/rewards.py:require_finite": 1} | elsewhere


def test_inference_is_recorded_as_a_graph_without_copies_and_waits(report):
    assert report["graphs"] == 1 and not report["captured"]


def test_no_pass_over_a_picture_is_for_nothing(library):
    counted = run(library, 64, 1, "mini", module="fake_picture")
    ops = counted["by_op"]
    assert counted["kernels"] == sum(number for number, _ in ops.values()) and counted["flop"] > 0
    assert not {"upsample_nearest2d", "constant_pad_nd", "native_group_norm", "silu"} & ops.keys()
    assert ops["div"][0] == 1  # of the latents, by their scale
    # A normalisation adds the bias of the convolution in front of it, a block's last sum those of the two before it.
    assert ops["bias"][0] < 0.3 * ops["convolution"][0]


@pytest.mark.slow
def test_the_memory_of_a_step_is_a_part_of_the_released_procedures(library, mini_sd):
    """In miniature, where weights count for little; docs/gpu.md has the peaks at full size."""
    ours, released = (run(library, mini_sd, procedure, "plain", 128, 4) for procedure in ("ours", "released"))
    assert 0 < ours["peak_mib"] < released["peak_mib"] / 2
    assert 0 < ours["kernels"] < released["kernels"] and 0 < ours["bytes"] < released["bytes"]
