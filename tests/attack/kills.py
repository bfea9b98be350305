"""SIGKILL, SIGINT and SIGTERM at random instants of upscaling and training; malicious pickles and archives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack.harness import Section, Trial, emptied
from tests.support.folders import model, write_folder
from tests.support.training import GDPO, NAOSD, ROOT, command

CLEAN = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=ROOT, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(arguments: list[str]) -> float:
    """Run a command that must succeed; returns how long it took."""
    began = time.monotonic()
    process = start(arguments)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, f"{arguments[2:4]}: exit {process.returncode}: {err[-600:]}"
    return time.monotonic() - began


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pictures(folder: Path, count: int, size: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        grain = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def upscale_command(work: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "engine.upscale", str(work / "in"), str(out), "--model", str(work / "model")]


def killed_upscale(work: Path) -> Trial:
    pictures(work / "in", 12, 96)
    write_folder(work / "model", model())
    took = finish(upscale_command(work, work / "straight"))
    straight = {k: v for k, v in files(work / "straight").items() if k.endswith(".png")}

    def trial(number: int) -> None:
        out = emptied(work / "out")
        process = start(upscale_command(work, out))
        time.sleep(random.Random(number).uniform(0.3, 1) * took)
        process.kill()
        process.communicate()
        torn = [k for k, v in files(out).items() if k.endswith(".png") and ".partial" not in k and straight[k] != v]
        assert not torn, f"torn: {torn}"
        finish(upscale_command(work, out))
        again = files(out)
        assert {k: v for k, v in again.items() if k.endswith(".png")} == straight
        assert not [k for k in again if ".partial" in k], "left something behind"

    return trial


def killed_training(method: str):
    steps = 24

    def prepare(work: Path) -> Trial:
        crops = pictures(work / "crops", 6, 96)
        lengths = [f"--data.folder={crops}", f"--max_train_steps={steps}", "--checkpointing_steps=2"]
        options = [*NAOSD, *lengths]
        if method == "gdpo":
            finish(command(*NAOSD, f"--data.folder={crops}", "--max_train_steps=2", f"--output_dir={work / 'base'}"))
            options = [*GDPO, *lengths, f"--model.pretrained={work / 'base' / 'model'}"]
        finish(command(*options, f"--output_dir={work / 'straight'}"))
        straight = files(work / "straight" / "model")

        def trial(number: int) -> None:
            run = emptied(work / "run")
            run.rmdir()
            resumed = command(*options, f"--output_dir={run}", "--resume_from_checkpoint=auto")
            rng, process = random.Random(number), start(resumed)
            rows = run / "metrics.jsonl"
            for _ in range(10_000):  # until a random step
                done = rows.read_text().count("\n") if rows.is_file() else 0
                if process.poll() is not None or done >= 1 + number % (steps - 2):
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            process.kill()
            process.communicate()
            finish(resumed)
            assert files(run / "model") == straight, "another model"
            left = [p.name for p in run.iterdir() if p.name.startswith((".staged", ".removed", ".gdpo"))]
            assert not left, f"left behind: {left}"

        return trial

    return prepare


def signalled(work: Path) -> Trial:
    pictures(work / "in", 12, 96)
    write_folder(work / "model", model())
    bundled = str(ROOT / "engine" / "data" / "tiny")
    python = [sys.executable, "-m"]
    cropping = ["--size", "64", "--stride", "1", "--halve", "false"]
    commands = [
        lambda out: upscale_command(work, out),
        lambda out: [*python, "engine.build", str(work / "model"), "--out", str(out), "--backend", "onnxruntime"],
        lambda out: [*python, "gdpo.prepare", str(work / "in"), "--out", str(out), *cropping],
        lambda out: [*python, "gdpo.convert", bundled, "--out", str(out)],
        lambda out: command(*NAOSD, f"--data.folder={work / 'in'}", f"--output_dir={out}", "--max_train_steps=999"),
    ]

    def trial(number: int) -> None:
        rng, out = random.Random(number), emptied(work / "out")
        out.rmdir()
        process = start(commands[number % len(commands)](out))
        time.sleep(rng.uniform(0.05, 8))
        sent, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[number // len(commands) % 2]
        process.send_signal(sent)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (code, 0), f"exit {process.returncode}: {err[-600:]}"
        assert "Traceback" not in err and "Exception" not in err, err[-600:]
        assert process.returncode == 0 or err.strip().splitlines()[-1].startswith("error: "), err[-300:]
        left = [p for p in work.iterdir() if p.name.startswith(".")] + list(
            out.rglob("*.partial*") if out.is_dir() else ()
        )
        assert not left, f"left behind: {left}"

    return trial


def archives(work: Path) -> Trial:
    from gdpo.convert import convert
    from gdpo.model.random_folder import build_folder
    from tests.gdpo.test_malicious_files import DAMAGING, EXECUTING

    base, attacks = build_folder(work / "base"), {**EXECUTING, **DAMAGING}

    def trial(number: int) -> None:
        name = list(attacks)[number % len(attacks)]
        source, marker = emptied(work / "in") / "model.pkl", work / "owned"
        attacks[name](source, marker)
        try:
            convert(source, work / "out", base)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, name
        else:
            raise AssertionError(f"{name}: accepted")
        time.sleep(0.05)  # what it started may not wait
        assert not marker.exists() and not (work / "out").exists(), name

    return trial


SECTIONS = [
    Section("kill-upscale", "SIGKILL while a folder is upscaled, then again", 40, killed_upscale, seconds=300),
    Section("kill-naosd", "SIGKILL of NAOSD training, then resumed", 20, killed_training("naosd"), seconds=300),
    Section("kill-gdpo", "SIGKILL of GDPO training, then resumed", 20, killed_training("gdpo"), seconds=300),
    Section("signals", "SIGINT and SIGTERM", 40, signalled, seconds=300),
    Section("archives", "malicious pickles and archives", 36, archives, seconds=20, mib=1000),
]
