"""The paper's ablation at small scale, with equal steps: GDPO, fixed weights (rho 0.5), and other algorithms on the
same groups: Diffusion-DPO (best against worst), DP2O-SR's pairs, GRPO on the one-step likelihood, DiffusionNFT.

    python -m benchmarks.gdpo_ablation --config configs/tiny-gdpo.yaml --steps 300 --every 50 --out runs/ablation

All of them start from the model of the configuration, see the same pictures and noises, and are judged alike, at every
checkpoint, on held-out crops (gdpo.evaluation.before_after): the attribute-aware reward against the starting model,
PSNR-Y, the no-reference score, and the two artefact figures. The curves show where a reward begins to be hacked: it
still rises while fidelity falls or an artefact figure climbs. After an interruption it continues where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from gdpo.evaluation.before_after import Options, measure
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.train import checkpoint as checkpoints

VARIANTS: dict[str, tuple[str, ...]] = {
    "GDPO": (),
    "DPO": ("--algorithm", "diffusion_dpo"),
    "rho=0.5": ("--rho", "0.5"),
    "DP2O": ("--algorithm", "dp2o"),
    "GRPO": ("--algorithm", "grpo"),
    "NFT": ("--algorithm", "nft"),
}


def at_checkpoint(model: str, folder: Path) -> OneStepGenerator:
    """The finished run's model with the LoRA that it had at a checkpoint.

    Raises:
        ValueError: a checkpoint that is damaged, or another model's.
    """
    generator = OneStepGenerator.from_pretrained(model)
    saved = checkpoints.load(folder).tensors["trainable"]
    own = {f"policy/{name}": p for name, p in lora.parameters(generator.unet).items()}
    if own.keys() != saved.keys():
        raise ValueError(f"{folder} does not fit {model}: another model's checkpoint?")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return generator


def curve(name: str, out: Path, crops: int) -> list[dict[str, Any]]:
    """The figures of one variant at each of its checkpoints; those already measured are read back."""
    config = json.loads((out / name / "config.json").read_text())
    data, preset = config["data"], config["degradation"]["preset"]
    options = Options(
        str(out / name / "model"), data=data["folder"], crop_size=data["crop_size"], crops=crops, preset=preset,
        reward_funcs=tuple(config["reward_funcs"]), reward_weights=config.get("reward_weights"),
        reward_normalization=config.get("reward_normalization", "group"), texture_threshold=config["texture_threshold"],
    )  # fmt: skip
    measured = []
    for folder in sorted((out / name).glob("checkpoint-*")):
        step = int(folder.name.removeprefix("checkpoint-"))
        kept = out / name / "gain" / f"{step}.json"
        if not kept.is_file():
            generator = at_checkpoint(str(out / name / "model"), folder)
            kept.parent.mkdir(exist_ok=True)
            result = measure(generator, replace(options, out=str(kept.with_suffix(""))))
            atomic_write(kept, json.dumps({"variant": name, "step": step, **result}, indent=1) + "\n")
        measured.append(json.loads(kept.read_text()))
    return measured


def figures(result: dict[str, Any]) -> list[str]:
    """What was measured: the reward, its parts, the artefacts."""
    return [key.removesuffix("_gain") for key in result if key.endswith("_gain")]


def table(last: list[dict[str, Any]], start: dict[str, Any]) -> str:
    """Markdown: the starting model and every variant at its last step."""
    names = figures(start)
    lines = [f"| | steps | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    lines.append("| start | 0 | " + " | ".join(f"{start[f'{f}_before']:.4f}" for f in names) + " |")
    for row in last:
        cells = [f"{row[f'{f}_after']:.4f} ({row[f'{f}_gain']:+.4f} ± {row[f'{f}_standard_error']:.4f})" for f in names]
        lines.append(f"| {row['variant']} | {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Each figure's change against the steps, a line for each variant, its standard error as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = figures(next(iter(curves.values()))[0])
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained")
    for panel, name in zip(panels, names):
        for variant, points in curves.items():
            steps, gain, error = ([0.0] + [p[key] for p in points] for key in
                                  ("step", f"{name}_gain", f"{name}_standard_error"))  # fmt: skip
            panel.plot(steps, gain, marker="o", markersize=3, label=variant)
            panel.fill_between(
                steps, [g - e for g, e in zip(gain, error)], [g + e for g, e in zip(gain, error)], alpha=0.2
            )
        panel.axhline(0, color="gray", linewidth=0.5)
        panel.set(title=f"change of {name}", xlabel="step")
    panels[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> int:
    p = Parser(prog="python -m benchmarks.gdpo_ablation", description=__doc__)
    p.add_argument("--config", default="configs/tiny-gdpo.yaml", help="of gdpo.train gdpo")
    p.add_argument("--out", default="runs/ablation", metavar="DIR")
    p.add_argument("--steps", type=PositiveInt, default=300)
    p.add_argument("--every", type=PositiveInt, default=50, help="measure at every n-th step")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--crops", type=PositiveInt, default=48, help="held-out crops")
    p.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of gdpo.train for all variants")
    p.add_argument("--write-rows", action="store_true", help="append to benchmarks/results/gdpo_ablation.jsonl")
    args = p.parse_args()
    if args.write_rows:
        rows.require_clean()
    out, curves = Path(args.out), {}
    for name in args.variants:
        command = [sys.executable, "-m", "gdpo.train", "gdpo", "--config", args.config]
        command += ["--output_dir", out / name, "--max_train_steps", args.steps, "--checkpointing_steps", args.every]
        command += ["--checkpoints_total_limit", max(2, args.steps), "--resume_from_checkpoint", "auto"]
        subprocess.run(
            [str(word) for word in (*command, *VARIANTS[name], *(f"--{option}" for option in args.set))], check=True
        )
        curves[name] = curve(name, out, args.crops)
    text = table([points[-1] for points in curves.values()], curves[args.variants[0]][0])
    atomic_write(out / "table.md", text)
    plot(curves, out / "curves.png")
    print(f"\n{text}\n{out}: table.md, curves.png")
    if args.write_rows:
        for points in curves.values():
            for point in points:
                rows.append_row("gdpo_ablation", **point, **({"set": args.set} if args.set else {}))
    return 0


if __name__ == "__main__":
    run(main)
