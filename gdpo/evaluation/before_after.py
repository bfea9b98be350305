"""What GDPO changed: a tuned model against the one it started from, on held-out crops with fixed noise.

    python -m gdpo.evaluate --before-after runs/tiny-gdpo/model --data data/crops --out runs/gain

Both are the same folder: "before" is the model with its LoRA off. For every crop, N noises are drawn once and given to
both; the 2N samples form one group, scored as in training (min-max inside the group, weighted by the smooth and the
textured share). The report has the mean difference of that reward with its standard error and its 95% bootstrap
interval over crops, the raw scores, scores that training did not optimise (`metrics`), and a sheet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat
from tqdm import tqdm

from engine.io import rows
from engine.io.cli import Parser
from engine.io.files import atomic_write
from gdpo.degradation import Degradation, DegradationConfig
from gdpo.evaluation.columns import build_metrics
from gdpo.generator import OneStepGenerator
from gdpo.model import lora
from gdpo.photos.dataset import CropDataset, loader
from gdpo.photos.folder import read_jsonl
from gdpo.scores.group import GroupReward, Normalization
from gdpo.scores.registry import PerPicture, Unavailable
from gdpo.scores.rewards import build_rewards
from gdpo.train.gain import compare
from gdpo.train.pictures import sheet

_TELLTALE = ("grid_artefact", "lattice_artefact", "oversharpening", "brisque")

SHOWN, AMPLIFIED = 6, 16  # crops of the sheet; how much its change is enlarged


@dataclass
class Options:
    """How the two are compared.

    Args:
        model: a folder that gdpo.train gdpo made (base and LoRA apart).
        strength: how much of the LoRA, as in gdpo.merge: above 1, more than was trained.
        data: a folder made by gdpo.prepare; its val split is used.
        out: folder for the sheet.
        crops: number of held-out crops, at most all of them.
        crop_size: side of the crops.
        noises: samples of each model per crop.
        reward_funcs: rewards, as in training; so are the next four options.
        reward_weights: a number for each of reward_funcs.
        reward_normalization: how rewards are combined.
        rho: smooth share, which fidelity counts by; "auto": each picture's own.
        texture_threshold: complexity above which a patch counts as texture.
        preset: preset of the degradation.
        metrics: further scores, by name; "auto" is the artefact figures, and BRISQUE where its package is installed.
        seed: random seed of degradation and noise; not that of a training.
        write_rows: append the result to benchmarks/results/gdpo_gain.jsonl.
    """

    model: str
    strength: NonNegativeFloat = 1.0
    data: str = "data/crops"
    out: str = "runs/gain"
    crops: int = 64
    crop_size: int = 128
    noises: int = 4
    reward_funcs: tuple[str, ...] = ("psnr_y", "naturalness")
    reward_weights: tuple[float, ...] | None = None
    reward_normalization: Normalization = GroupReward.normalization
    rho: float | Literal["auto"] = GroupReward.rho
    texture_threshold: float = GroupReward.threshold
    preset: str = "realesrgan"
    metrics: tuple[str, ...] = ("auto",)
    seed: int = 20_000
    write_rows: bool = False


@torch.no_grad()
def measure(generator: OneStepGenerator, o: Options) -> dict[str, float]:
    """Compare the generator with and without its LoRA on held-out crops, and write sheet.png: those that change most.

    Raises:
        ValueError: fewer than 2 crops, which have no spread, or more than there are (repeats are no observations).

    Returns: crops, noises, photos (from which the crops are cut, where the folder's manifest tells), and for every
    score NAME_before, NAME_after, NAME_gain, NAME_standard_error, NAME_low and NAME_high (95%).
    """
    if o.crops < 2:
        raise ValueError(f"crops must be at least 2; got {o.crops}")
    degrade = Degradation(DegradationConfig(preset=o.preset))  # type: ignore[arg-type]
    rewards = build_rewards(list(o.reward_funcs))
    reward = GroupReward(rewards, o.reward_weights, o.reward_normalization, o.rho, o.texture_threshold)
    metrics = {name: score for name, score in load_metrics(o.metrics).items() if name not in o.reward_funcs}
    dataset = CropDataset(o.data, "val", o.crop_size, captions=False)
    if o.crops > len(dataset):
        raise ValueError(f"crops must be at most {len(dataset)}, the held-out crops of {o.data}; got {o.crops}")
    samples = [i * len(dataset) // o.crops for i in range(o.crops)]
    found: dict[str, list[torch.Tensor]] = {}
    shown: list[tuple[float, list[torch.Tensor]]] = []
    batches = loader(dataset, [[s] for s in samples], seed=0)
    for batch in tqdm(batches, total=len(samples), unit="crop"):
        hr = batch.hr * 2 - 1
        lr, _ = degrade(batch.hr, seed=o.seed, step=0, samples=batch.samples)
        bicubic = degrade.upsample(lr) * 2 - 1
        compared = compare(
            generator, bicubic, hr, reward, samples=batch.samples, seed=o.seed, noises=o.noises
        )  # fmt: skip
        scores = {name: values[0] for name, values in compared.scores.items()}
        pair = torch.cat([compared.before, compared.after]).float().clamp(-1, 1) / 2 + 0.5
        for name, metric in metrics.items():
            scores[name] = metric(pair, batch.hr.expand_as(pair))
        for name, values in scores.items():
            found.setdefault(name, []).append(values)
        change = compared.after - compared.before
        shown.append((float(change.abs().mean()), [bicubic, compared.before, compared.after, change * AMPLIFIED, hr]))
        shown = sorted(shown, key=lambda crop: -crop[0])[:SHOWN]
    result: dict[str, float] = {"crops": float(o.crops), "noises": float(o.noises)}
    if photos := photos_of(dataset, samples):
        result["photos"] = float(photos)
    picks = np.random.default_rng(0).integers(0, o.crops, (10_000, o.crops))
    for name, per_crop in found.items():
        before_after = torch.stack(per_crop).double()  # [crops,2]
        gain = before_after[:, 1] - before_after[:, 0]
        result[f"{name}_before"], result[f"{name}_after"] = before_after.mean(0).tolist()
        result[f"{name}_gain"] = float(gain.mean())
        result[f"{name}_standard_error"] = float(gain.std() / len(gain) ** 0.5)
        low, high = np.percentile(gain.numpy()[picks].mean(1), (2.5, 97.5))
        result[f"{name}_low"], result[f"{name}_high"] = float(low), float(high)
    titles = ("bicubic", "before", "after GDPO", f"change x{AMPLIFIED}", "HR")
    sheet([(t, torch.cat([p[i] for _, p in shown])) for i, t in enumerate(titles)], Path(o.out) / "sheet.png")
    return result


def load_metrics(names: tuple[str, ...]) -> dict[str, PerPicture]:
    """The scores of these names; "auto" stands for those that tell what rewards do not.

    Raises:
        ValueError: an unknown name.
        Unavailable: a score whose package or weights are missing, unless "auto" chose it.
    """
    auto = names == ("auto",)
    found, missing = build_metrics(list(_TELLTALE if auto else names), "photos", torch.device("cpu"))
    if missing and not auto:
        raise Unavailable("; ".join(f"metrics: {name}: {reason}" for name, reason in missing.items()))
    return {metric.name: metric.score for metric in found}


def photos_of(dataset: CropDataset, samples: list[int]) -> int | None:
    """From how many photos these crops of the val split are cut, or None where no manifest tells."""
    manifest = dataset.folder / "manifest.jsonl"
    if not manifest.is_file():
        return None
    sources = {row["file"]: row.get("source") for row in read_jsonl(manifest, "file")}
    found = {sources.get(dataset.names[i]) for i in samples}
    return None if None in found else len(found)


def table(result: dict[str, float]) -> str:
    """The result as Markdown."""
    names = [k.removesuffix("_gain") for k in result if k.endswith("_gain")]
    photos = f" of {result['photos']:.0f} photo(s)" if "photos" in result else ""
    caveat = " Crops of one photo are alike: the errors are those of these photos, not of photos at large."
    lines = [
        f"{result['crops']:.0f} held-out crops{photos}, {result['noises']:.0f} noises each; ± is one standard error, "
        f"the interval holds 95% of 10,000 bootstrap resamples.{caveat if photos else ''}",
        "",
        "| score | before | after GDPO | difference | interval |",
        "|---|---|---|---|---|",
    ]
    for n in names:
        values = (result[f"{n}_{part}"] for part in ("before", "after", "gain", "standard_error", "low", "high"))
        lines.append("| {} | {:.4f} | {:.4f} | {:+.4f} ± {:.4f} | [{:.4f}, {:.4f}] |".format(n, *values))
    return "\n".join(lines) + "\n"


def parser() -> Parser:
    """The command line of `gdpo.evaluate --before-after`."""
    p = Parser(prog="python -m gdpo.evaluate", description=" ".join(__doc__.split("\n\n")[::2]))  # no example
    p.add_argument("--before-after", dest="model", required=True, metavar="MODEL", help=HELP)
    p.add_class_arguments(Options, None, skip={"model"})
    return p


HELP = "a model that gdpo.train gdpo made: compare it with what it was before"


def main() -> int:
    """Measure, print the table, write table.md and sheet.png."""
    options = Options(**vars(parser().parse_args()))
    lora.check_strength(options.strength)
    if options.write_rows:
        rows.require_clean()
    generator = OneStepGenerator.from_pretrained(options.model)
    if options.strength != 1:
        adapted = [m for m in (generator.unet, generator.vae) if m is not None and lora.adapters(m)]
        if not adapted:
            raise ValueError(f"{options.model} has no LoRA apart; strength {options.strength} needs one")
        for module in adapted:
            lora.scale(module, options.strength)
    result = measure(generator, options)
    text = table(result)
    atomic_write(Path(options.out) / "table.md", text)
    print(text)
    if options.write_rows:
        about = {"model": Path(options.model).parent.name, "strength": options.strength, "preset": options.preset}
        rows.append_row("gdpo_gain", **about, **result)
    return 0
