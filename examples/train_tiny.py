"""The bundled models, from photos to engine folders: python examples/train_tiny.py [--out DIR].

Every step is a command that you can run yourself; after an interruption it continues. The photos come from Debian's
wallpaper packages; none of them is in RealSR. The folder gets a model card (README.md) that names every photo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from engine.io.cli import Parser
from engine.io.cli import run as run_command
from engine.io.files import atomic_write
from gdpo.generator import OneStepGenerator

CROPS = Path("data/crops")
FIRST = {"tiny-naosd": "naosd", "tiny-naosd-2": "naosd", "tiny-gdpo": "gdpo"}
TINY = {"tiny-gdpo-2": "gdpo"}
QUALITY = {"quality-naosd": "naosd", "quality-naosd-2": "naosd"}
NARROW = {"tiny-naosd-7": "naosd"}
SAFE = {"tiny-naosd-3": "naosd", "tiny-naosd-4": "naosd"}
SHARP = {"tiny-gdpo-3": "gdpo"}
FAITHFUL = {"tiny-naosd-5": "naosd", "tiny-naosd-6": "naosd", "tiny-gdpo-4": "gdpo"}
BLEND = 0.75  # of the trained weights, the rest of others: after the first GDPO, and where clean photos are safe
NOISE = 1.75  # times the noise that the network sees: fewer dots, and groups of samples that differ more
STRENGTH = 1.5  # of the second and third GDPO's change, chosen on held-out crops
MIXTURE = 0.65  # of tiny in the model that the third GDPO starts from
WIDTH, TAUGHT = 48, 0.8  # tiny: channels of every second activation, of 64; share of what teaching that changed
STUDENT, MORE_NOISE, LAST = 0.7, 1.2, 0.6  # of faithful: share beside its teacher, noise of a stage, last strength
SMALL, LARGE = "Real-ESRGAN animevideov3 (compact network)", "Real-ESRGAN x4plus (RRDBNet)"  # starts
NETWORK, LEVELS = "real-esrgan-x4plus", 1.3  # of quality: what it is made of, and the noise it sees, of 255 levels
SAFER = 0.6  # of what its second stage changed: all of it is safer on clean photos, and softer
BLOCKS = [2, 4, 7, 10, 13, 16, 18, 20, 22, 23]  # and what its blocks stand for: the network's up to these
NOTES = {  # stage -> where it starts, and what is done with its weights
    "tiny-gdpo": f"{BLEND:.0%} of these weights and the rest of the published network's",
    "tiny-gdpo-2": f"started with {NOISE:g} times the noise; {STRENGTH:g} times what training changed",
    "tiny-naosd-3": "from what tiny-gdpo gave",
    "tiny-naosd-4": f"{BLEND:.0%} of these weights and the rest of the stage before, {NOISE:g} times the noise: safe",
    "tiny-gdpo-3": f"from {MIXTURE:.0%} of tiny-gdpo-2, the rest safe; {STRENGTH:g} times what training changed: sharp",
    "tiny-naosd-5": f"from safe, taught by sharp; {STUDENT:.0%} of these weights and the rest of sharp",
    "tiny-naosd-6": f"started with {MORE_NOISE:g} times the noise",
    "tiny-gdpo-4": f"started with {MORE_NOISE:g} times the noise; {LAST:g} times what training changed",
    "quality-naosd": f"from {len(BLOCKS)} blocks that stand for the network's {BLOCKS[-1]}",
    "quality-naosd-2": f"{SAFER:g} of the change",
    "tiny-naosd-7": f"{WIDTH} channels in every second activation, taught by tiny with 64; {TAUGHT:g} of the change",
}
CARD = """# {title} of GDPO-SR

One-step x4 super-resolution without a VAE: {parameters:.2f} M parameters on pixel-unshuffled latents; noise added at
t={t_noise}, removed in one step. In: a photo; out: a sharper one, four times its size. Made for a laptop's CPU.

- **Starting weights**: {start}, BSD-3-Clause, copyright 2021 Xintao Wang; licence
  below.
- **Recipe**: `python examples/train_tiny.py`, that is {stages}.
  On {train} crops of 256x256 from the photos below and two drawn pages of print, halved by area averaging.
  Degradation: from a plain bicubic reduction to the second-order process of Real-ESRGAN; of degraded crops, pictures
  by Real-ESRGAN x4plus (BSD-3-Clause) are targets beside the photo itself.
- **Quality**: docs/results.md of the repository. {held} crops of four of the photos were held out, and RealSR was used
  for measuring only.
- **Licence of the weights**: Apache-2.0 as the project, with Real-ESRGAN's notice below. Licences of the photos: below;
  none of them is contained here.

| photo | author | licence | used for | sha256 |
|---|---|---|---|---|
{photos}

```
{notice}
```
"""


def run(module: str, *arguments: object) -> None:
    """Run one of the project's commands, shown as you would type it."""
    command = ["-m", module, *map(str, arguments)]
    print("$ python " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def train(stages: dict[str, str]) -> None:
    """Each stage in turn, from where it stopped."""
    for name, method in stages.items():
        run("gdpo.train", method, "--config", f"configs/{name}.yaml", "--resume_from_checkpoint", "auto")


def blend(model: str, *, base: str, out: str | Path, share: float = BLEND) -> None:
    """A share of a model's weights, the rest from another."""
    run("gdpo.merge", model, "--base", base, "--strength", share, "--out", out, "--overwrite")


def merge(stage: str, *, strength: float, out: str) -> None:
    """What a GDPO stage trained, in the weights."""
    run("gdpo.merge", f"runs/{stage}/model", "--strength", strength, "--out", out, "--overwrite")


def noisier(model: str, out: str, times: float = NOISE) -> None:
    """A compact model that sees so many times the noise."""
    generator = OneStepGenerator.from_pretrained(model)
    with torch.no_grad():
        generator.unet.grain.weight.mul_(times)
    generator.save_pretrained(Path(out))


def export(title: str, start: str, stages: Iterable[str], model: Path, out: Path, *options: str) -> None:
    """Write an engine folder with its card."""
    run("engine.export", model, "--out", out, *options)
    atomic_write(out / "README.md", model_card(title, start, stages, model, out))


def model_card(title: str, start: str, names: Iterable[str], model: Path, engine: Path) -> str:
    """The card of a model folder made in these stages, exported to `engine`, from what training has recorded."""
    crops = [json.loads(line) for line in (CROPS / "manifest.jsonl").read_text("utf-8").splitlines()]
    used = {c["source_sha256"]: "training" if c["file"].startswith("train/") else "held out" for c in crops}
    catalogue = json.loads(Path("gdpo/resources/photos.json").read_text("utf-8"))
    photos = [
        f"| {p['title']} ({p['package']}) | {p['author']} | {p['licence']} | {used[p['sha256']]} | `{p['sha256']}` |"
        for p in catalogue
        if p["sha256"] in used
    ]
    configs = {name: json.loads((Path("runs") / name / "config.json").read_text()) for name in names}
    stages = [
        f"{config['max_train_steps']} steps of configs/{name}.yaml" + (f" ({NOTES[name]})" if name in NOTES else "")
        for name, config in configs.items()
    ]
    generator = json.loads((model / "generator.json").read_text())
    held = sum(c["file"].startswith("val/") for c in crops)
    return CARD.format(
        title=title,
        start=start,
        parameters=json.loads((engine / "manifest.json").read_text())["model"]["parameters"] / 1e6,
        t_noise=generator["t_noise"],
        t_diffusion=generator["t_diffusion"],
        stages=",\n  then ".join(stages),
        train=len(crops) - held,
        held=held,
        photos="\n".join(photos),
        notice=Path("gdpo/resources/real-esrgan-licence.txt").read_text("utf-8").strip(),
    )


def main() -> None:
    parser = Parser(prog="python examples/train_tiny.py", description="Train and export the bundled models.")
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"), help="folder for the engine folders")
    out = parser.parse_args().out
    run("gdpo.assets", "vgg16", "photos", "print", "real-esrgan")
    from gdpo.assets import asset

    cut = ["--size=256", "--stride=128", "--halve=true", "--min_texture=0.1"]
    run("gdpo.prepare", asset("photos"), asset("print"), "--out", CROPS, *cut)
    run("gdpo.targets", "--config", "configs/tiny-naosd.yaml")
    train(FIRST)
    # A quarter of the published network's weights: cleaner edges, less speckle (docs/results.md, the blind choice).
    merge("tiny-gdpo", strength=1, out="runs/tiny-merged")
    blend("runs/tiny-merged", base="compact", out="runs/tiny-blended")
    # More of the noise, then rewards for features, fidelity and detail (docs/results.md, what GDPO gains).
    noisier("runs/tiny-blended", "runs/tiny-noisier")
    train(TINY)
    merge("tiny-gdpo-2", strength=STRENGTH, out="runs/tiny")
    run("gdpo.shrink", "runs/tiny", "--width", WIDTH, "--crops", CROPS, "--out", "runs/tiny-narrow", "--overwrite")
    train(NARROW)
    blend("runs/tiny-naosd-7/model", base="runs/tiny-narrow", out="runs/tiny-fast", share=TAUGHT)
    export("The tiny generator", SMALL, FIRST | TINY | NARROW, Path("runs/tiny-fast"), out / "tiny")
    # From before that: clean photos, then the texture that this costs; a quarter of the weights in between are closer
    # to bicubic.
    train(SAFE)
    blend("runs/tiny-naosd-4/model", base="runs/tiny-naosd-3/model", out="runs/safe")
    noisier("runs/safe", "runs/safe-noisier")
    # Between the two, GDPO makes a teacher that is sharp on degraded input; the safe model learns that, and no more.
    blend("runs/tiny", base="runs/safe-noisier", out="runs/tiny-mixed", share=MIXTURE)
    train(SHARP)
    merge("tiny-gdpo-3", strength=STRENGTH, out="runs/tiny-sharp")
    train({"tiny-naosd-5": "naosd"})
    blend("runs/tiny-naosd-5/model", base="runs/tiny-sharp", out="runs/faithful-blended", share=STUDENT)
    noisier("runs/faithful-blended", "runs/faithful-start", MORE_NOISE)
    train({"tiny-naosd-6": "naosd"})
    noisier("runs/tiny-naosd-6/model", "runs/faithful-noisier", MORE_NOISE)
    train({"tiny-gdpo-4": "gdpo"})
    merge("tiny-gdpo-4", strength=LAST, out="runs/faithful")
    export(
        "The faithful generator", SMALL, FIRST | TINY | SAFE | SHARP | FAITHFUL, Path("runs/faithful"), out / "faithful"
    )
    # Larger, by another network: fewer blocks, which learn from all of them, and from the photo where it lost little.
    run("gdpo.convert", NETWORK, "--noise", LEVELS, "--out", "runs/x4plus", "--overwrite")
    fewer = ["--blocks", json.dumps(BLOCKS), "--crops", CROPS, "--out", "runs/quality-start", "--overwrite"]
    run("gdpo.shrink", "runs/x4plus", *fewer)
    run("gdpo.targets", "--config", "configs/quality-naosd.yaml")
    train(QUALITY)
    blend("runs/quality-naosd-2/model", base="runs/quality-naosd/model", out="runs/quality", share=SAFER)
    export(
        "The quality generator",
        LARGE,
        QUALITY,
        Path("runs/quality"),
        out / "quality",
        "--weights=int8",
        "--on-cpu=bf16",
    )
    print(f"Try it: python -m engine.upscale PHOTO OUT --model {out / 'tiny'}", file=sys.stderr)


if __name__ == "__main__":
    try:
        run_command(main)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
