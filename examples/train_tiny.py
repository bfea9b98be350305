"""The model that ships, from photos to engine folder: python examples/train_tiny.py (about two hours on two cores).

Every step is a command that you can run yourself; interrupted, it goes on where it was. The photos come from Debian's
wallpaper packages (authors and licences: gdpo/data/photos.json); none of them is in RealSR.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CROPS, ONNX = Path("data/crops"), Path("runs/tiny-onnx")
STAGES = (("naosd", "tiny-naosd"), ("naosd", "tiny-naosd-finetune"), ("gdpo", "tiny-gdpo"))


def run(module: str, *arguments: object) -> None:
    """Run one of the project's commands, shown as you would type it."""
    command = ["-m", module, *map(str, arguments)]
    print("$ python " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    run("gdpo.assets", "vgg16", "photos")
    from gdpo.assets import asset

    run("gdpo.prepare", asset("photos"), "--out", CROPS, "--size=256", "--stride=128", "--halve=true")
    for method, name in STAGES:
        run("gdpo.train", method, "--config", f"configs/{name}.yaml", "--resume_from_checkpoint", "auto")
    run("engine.export", "runs/tiny-gdpo/model", "--out", ONNX)
    print(f"Try it: python -m engine.upscale PHOTO OUT --model {ONNX}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
