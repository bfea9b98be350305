"""make demo: the whole way in a few minutes on a CPU, every step a command that you can run yourself.

Real photos are fetched and cut into crops, and a tiny generator is trained on them (NAOSD). The one that ships, trained
for hours, is tuned (GDPO; samples of a generator of minutes hardly differ, so there is little to compare), evaluated on
photos that it never saw, and upscales one. The pictures and the table are named at the end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

RUNS = Path("runs/demo")
# A photo of the held-out set, and what of it is upscaled.
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
    say("1/6 real photos (downloaded once)")
    run("gdpo.assets", "vgg16", "photos-small", "demo-photos")
    from gdpo.assets import asset

    say("2/6 crops")
    run("gdpo.prepare", asset("photos-small"), "--out", RUNS / "crops", "--size=256", "--stride=256", "--halve=true")

    say("3/6 NAOSD: a one-step generator from scratch")
    resume = ("--resume_from_checkpoint", "auto")
    naosd, gdpo = RUNS / "naosd", RUNS / "gdpo"
    run("gdpo.train", "naosd", "--config", "configs/demo-naosd.yaml", *resume)

    say("4/6 GDPO: the generator that ships, tuned by comparing its own samples")
    run("gdpo.convert", "engine/data/tiny", "--out", RUNS / "shipped", "--overwrite")
    run("gdpo.train", "gdpo", "--config", "configs/demo-gdpo.yaml", *resume)

    say("5/6 what GDPO changed, on crops of photos that were not trained on")
    run(
        "gdpo.evaluation.before_after", gdpo / "model", "--data", RUNS / "crops", "--out", RUNS / "gain",
        "--preset", "light", "--crops", 32,
    )  # fmt: skip

    say("6/6 a photo upscaled by the engine")
    run("engine.export", gdpo / "model", "--out", RUNS / "onnx")
    run("engine.build", RUNS / "onnx", "--out", RUNS / "engine", "--backend", "onnxruntime")
    photo = next(p for p in sorted(asset("demo-photos").iterdir()) if p.stem == PHOTO)
    small = RUNS / "photo.png"
    Image.open(photo).convert("RGB").crop(WINDOW).save(small)
    run("engine.upscale", small, RUNS / "photo-x4.png", "--model", RUNS / "engine", "--overwrite")

    print(
        f"""
Done in {(time.monotonic() - started) / 60:.1f} minutes. Look at
  {RUNS}/photo.png -> {RUNS}/photo-x4.png     a photo upscaled x4
  {naosd}/sheets, {gdpo}/sheets               before/after sheets of training
  {naosd}/curves.png, {gdpo}/curves.png       losses and rewards
  {RUNS}/gain/table.md, {RUNS}/gain/sheet.png   what GDPO changed on crops that were not trained on
Training for minutes shows that everything works, not what the method can do: the README has the real recipe."""
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
