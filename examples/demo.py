"""`make demo`: the whole way in a few minutes on a CPU, every step a command that you can run yourself.

A photo is upscaled with the bundled model. That model is tuned on real photos (GDPO) and compared with itself before,
on photos that it was not tuned on; then it is exported, built, and upscales the photo again. The pictures and the table
are named at the end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from engine.io.cli import run as run_command

RUNS = Path("runs/demo")
# A held-out photo, and what of it is upscaled.
PHOTO, WINDOW = "coffee", (150, 60, 406, 316)


def say(title: str) -> None:
    print(f"\n=== {title}", file=sys.stderr, flush=True)


def run(module: str, *arguments: object) -> None:
    """Run one of the project's commands, shown as you would type it."""
    command = ["-m", module, *map(str, arguments)]
    print("$ python " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    started = time.monotonic()
    say("1/5 real photos (downloaded once), one of them upscaled with the bundled model")
    run("gdpo.assets", "photos-small", "demo-photos")
    from gdpo.assets import asset

    photo = next(p for p in sorted(asset("demo-photos").iterdir()) if p.stem == PHOTO)
    small = RUNS / "photo.png"
    RUNS.mkdir(parents=True, exist_ok=True)
    Image.open(photo).convert("RGB").crop(WINDOW).save(small)
    run("engine.upscale", small, RUNS / "photo-bundled-x4.png", "--overwrite")

    say("2/5 crops to train on, and others to judge by")
    run("gdpo.prepare", asset("photos-small"), "--out", RUNS / "crops", "--size=256", "--stride=256", "--halve=true")

    say("3/5 GDPO: the bundled model, tuned by comparing its own samples")
    gdpo = RUNS / "gdpo"
    run("gdpo.convert", "tiny", "--out", RUNS / "bundled", "--overwrite")
    run("gdpo.train", "gdpo", "--config", "configs/demo-gdpo.yaml", "--resume_from_checkpoint", "auto")

    say("4/5 what GDPO changed, on crops of photos that it was not tuned on")
    run(
        "gdpo.evaluate", "--before-after", gdpo / "model", "--data", RUNS / "crops", "--out", RUNS / "gain",
        "--preset", "light", "--crops", 32,
    )  # fmt: skip

    say("5/5 the tuned model exported, built, and the photo upscaled again")
    run("engine.export", gdpo / "model", "--out", RUNS / "onnx")
    run("engine.build", RUNS / "onnx", "--out", RUNS / "engine", "--backend", "onnxruntime")
    run("engine.upscale", small, RUNS / "photo-tuned-x4.png", "--model", RUNS / "engine", "--overwrite")

    print(
        f"""
Done in {(time.monotonic() - started) / 60:.1f} minutes. Look at
  {RUNS}/photo.png                              a photo
  {RUNS}/photo-bundled-x4.png                   upscaled by the bundled model
  {RUNS}/photo-tuned-x4.png                     upscaled by the tuned one
  {RUNS}/gain/table.md, {RUNS}/gain/sheet.png     what GDPO changed on held-out crops
  {gdpo}/curves.png, {gdpo}/sheets                losses and rewards; sheets while it trained
Minutes of training show that everything works, not what the method can do: docs/training.md has the real recipe."""
    )


if __name__ == "__main__":
    try:
        run_command(main)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
