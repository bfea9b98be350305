"""Run training through the real command line, on a miniature of the tiny preset."""

from __future__ import annotations

import subprocess
import sys

from tests.support import commands
from tests.support.commands import ROOT, environment

SMALL = [
    "--model.block_out_channels=[8,16]",
    "--model.layers_per_block=1",
    "--data.crop_size=64",
    "--logging_steps=1",
    "--validation_images=2",
    "--mixed_precision=no",  # "auto" is bf16 on a CPU that computes in it, and rounds away what tests compare
]
NAOSD = ["naosd", "--model.full=true", "--vsd_weight=0", "--perceptual_weight=0", "--learning_rate=1e-3", *SMALL]
GDPO = [
    "gdpo",
    "--num_generations=3",
    "--model.lora_rank=2",
    "--learning_rate=1e-3",
    "--reward_funcs=[psnr_y,naturalness]",
    *SMALL,
]


def command(*arguments: str, processes: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "gdpo.train", *map(str, arguments)]


def train_here(monkeypatch, *arguments, curves: bool = False) -> None:
    """The same command in this process: no seconds for a start, nor, unless asked, for curves; errors are raised."""
    from accelerate.state import AcceleratorState

    from gdpo.train import pictures
    from gdpo.train.__main__ import main

    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gdpo.train", *map(str, arguments)])
            if not curves:
                patch.setattr(pictures, "curves", lambda *_: None)
            main()
    finally:  # accelerate keeps what it was started with for the whole process
        AcceleratorState._reset_state(reset_partial_state=True)


def train(
    *arguments, check: bool = True, processes: int = 1, torchrun: bool = False, **extra
) -> subprocess.CompletedProcess:
    """Run `python -m gdpo.train ...` from the repository root, or several processes that train together.

    Args:
        torchrun: several are started by it; else they are given what it would give them, which takes a third as long.
    """
    if torchrun:
        done = subprocess.run(
            command(*arguments, processes=processes), cwd=ROOT, env=environment(**extra),
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    elif processes > 1:
        done = commands.run_ranks(processes, "gdpo.train", *arguments, **extra)
    else:
        done = commands.run("gdpo.train", *arguments, **extra)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}")
    return done
