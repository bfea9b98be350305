"""Fit the parameters in gdpo/resources from photos taken as pristine: `python -m gdpo.scores.metrics.fit --photos DIR`.

Photos are halved by area averaging first (their JPEG blocks and Bayer noise go); textured 128x128 crops are used. With
`--holdout` every second photo is kept aside and a table says how often a held-out crop ranks above its distorted copy.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from engine.io.images import read_srgb
from engine.io.picture import to_8_bit
from gdpo.scores.metrics import natural_scene, niqe_model
from gdpo.scores.metrics.common import gaussian, smooth

CROP, PER_PHOTO, LEAST_GRADIENT = 128, 40, 3.0
LEAST_SHARPNESS = 7.0  # 8-bit levels of local deviation


def main() -> None:
    parser = Parser(prog="python -m gdpo.scores.metrics.fit", description=__doc__)
    parser.add_argument("--photos", type=str, required=True, help="folder of photos")
    parser.add_argument(
        "--out", type=str, default=str(natural_scene.PARAMETERS.parent), help="folder of the parameters"
    )
    parser.add_argument("--holdout", action="store_true", help="fit on every second photo, test on the others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    photos = read_photos(Path(args.photos))
    crops = photo_crops(photos)
    generator = torch.Generator().manual_seed(args.seed)
    if args.holdout:
        metric, target = fit_naturalness(torch.cat(crops[::2]), generator)
        for name, share in ranking(torch.cat(crops[1::2]), metric, target, generator).items():
            print(f"{name:24s} {share:.3f}")
        return
    from safetensors.torch import save

    out = Path(args.out)
    for name, block in (("photos", 96), ("photos-32", 32)):
        model = fit_niqe(photos, name, block)
        stored = {"mean": model.mean, "covariance": model.covariance, "block": torch.tensor(block)}
        atomic_write(out / f"niqe-{name}.safetensors", save(stored))
    metric, target = fit_naturalness(torch.cat(crops), generator)
    atomic_write(out / natural_scene.PARAMETERS.name, save({"metric": metric, "target": target}))


def read_photos(folder: Path) -> list[np.ndarray]:
    """The folder's photos at half size, [H,W,3] uint8, in the order of their names."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"{folder} holds no .jpg or .png; fetch photos with: python -m gdpo.assets photos")
    out = []
    for path in tqdm(paths, desc="photos"):
        out.append(np.asarray(Image.fromarray(to_8_bit(read_srgb(path))).reduce(2)))
    return out


def photo_crops(photos: list[np.ndarray]) -> list[Tensor]:
    """Up to 40 textured crops [n,3,128,128] in [0,1] of each photo that has any, spread over it."""
    out = []
    for i, photo in enumerate(photos):
        tiles = [
            photo[y : y + CROP, x : x + CROP]
            for y in range(0, photo.shape[0] - CROP + 1, CROP)
            for x in range(0, photo.shape[1] - CROP + 1, CROP)
        ]
        tiles = [t for t in tiles if np.hypot(*np.gradient(t.astype(np.float32).mean(2))).mean() > LEAST_GRADIENT]
        order = np.random.default_rng(i).permutation(len(tiles))[:PER_PHOTO]
        if len(order):
            out.append(torch.from_numpy(np.stack([tiles[k] for k in order])).permute(0, 3, 1, 2) / 255)
    return out


def fit_niqe(photos: list[np.ndarray], name: str, block: int) -> niqe_model.NiqeModel:
    """Mean and covariance over the blocks with more than 0.75 of their photo's top sharpness, as the authors do.

    Blocks must also be sharp in themselves: the authors chose sharp photos, this project's include soft ones.
    """
    rows = []
    for photo in tqdm(photos, desc=f"NIQE {name}"):
        x = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        sharp = niqe_model.sharpness(x, block)[0]
        rows.append(niqe_model.niqe_features(x, block)[0][(sharp > 0.75 * sharp.max()) & (sharp > LEAST_SHARPNESS)])
    f = torch.cat(rows)
    f = f[f.isfinite().all(1)]
    return niqe_model.NiqeModel(name, block, f.mean(0), torch.cov(f.T))


# ---- distortions: [N,3,H,W] in 0..255 at a strength u in [0,1] ----


def blur(x: Tensor, sigma: float) -> Tensor:
    return smooth(x.flatten(0, 1), gaussian(sigma, int(3 * sigma) + 1)).view_as(x)


def pattern(x: Tensor, period: int, amplitude: float, g: torch.Generator, gray: bool = True) -> Tensor:
    """Add one zero-mean pattern of this period and RMS amplitude: what a pixel shuffle leaves."""
    p = torch.randn(1, 1 if gray else 3, period, period, generator=g)
    p = p - p.mean((2, 3), keepdim=True)
    p = p / p.square().mean().sqrt()
    reps = [-(-n // period) for n in x.shape[2:]]
    return x + amplitude * p.repeat(1, 1, *reps)[..., : x.shape[2], : x.shape[3]]


def low_octaves(x: Tensor) -> Tensor:
    """Down by 4 and up again: bicubic super-resolution."""
    small = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
    return F.interpolate(small, x.shape[2:], mode="bicubic", antialias=True)


def median(x: Tensor) -> Tensor:
    """Median of 5x5: flat patches with sharp edges, as an oversmoothed restoration has."""
    windows = F.unfold(F.pad(x, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[:, None], 5)
    return windows.median(1).values.view_as(x)


def jpeg(x: Tensor, quality: int) -> Tensor:
    out = []
    for image in x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
        out.append(np.asarray(Image.open(buffer, formats=("JPEG",)), dtype=np.float32))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def _oversharp_bicubic(x: Tensor, u: float, g: torch.Generator) -> Tensor:
    y = low_octaves(x)
    return y + 2 * u * (y - blur(y, 2)) + 6 * u * torch.randn(x.shape, generator=g)


def _pick(values: tuple, g: torch.Generator):
    return values[int(torch.randint(len(values), (1,), generator=g))]


DISTORTIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "noise": lambda x, u, g: x + (1 + 14 * u) * torch.randn(x.shape, generator=g),
    "gray noise": lambda x, u, g: x + (1.5 + 14 * u) * torch.randn(x[:, :1].shape, generator=g),
    "blur": lambda x, u, g: blur(x, 0.6 + 2 * u),
    "lost octaves": lambda x, u, g: torch.lerp(low_octaves(x), x, 0.7 * u),
    "sharpening": lambda x, u, g: x + (0.3 + 2 * u) * (x - blur(x, _pick((0.7, 1.0, 1.5, 2.0, 3.0), g))),
    "oversharp bicubic": _oversharp_bicubic,
    "pattern": lambda x, u, g: pattern(x, _pick((2, 4, 8), g), 0.7 + 4 * u, g),
    "chroma pattern": lambda x, u, g: pattern(x, _pick((2, 4, 8), g), 1 + 4 * u, g, gray=False),
    "jpeg": lambda x, u, g: jpeg(x, round(80 - 60 * u)),
    "median": lambda x, u, g: torch.lerp(x, median(x), 0.4 + 0.6 * u),
}


def _distorted(x: Tensor, name: str, u: float, g: torch.Generator) -> Tensor:
    return (DISTORTIONS[name](x * 255, u, g) / 255).clamp(0, 1)


def fit_naturalness(crops: Tensor, g: torch.Generator, rounds: int = 12, steps: int = 1500) -> tuple[Tensor, Tensor]:
    """(metric [F,F], target [F]) from pristine crops [N,3,H,W]; see natural_scene."""
    clean = natural_scene.features(crops)
    flat = clean.flatten(0, 1).double()
    covariance = torch.cov(flat.T)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance + 0.02 * covariance.diag().diag())).float()
    mean, spread = flat.mean(0).float(), flat.std(0).float()

    pairs: list[tuple[Tensor, Tensor]] = []
    for name in tqdm([n for n in DISTORTIONS for _ in range(rounds)], desc="distortions"):
        chosen = torch.randperm(len(crops), generator=g)[:64]
        u = float(torch.rand(1, generator=g))
        pairs.append((clean[chosen], natural_scene.features(_distorted(crops[chosen], name, u, g))))
    good, bad = (torch.cat(side) for side in zip(*pairs))

    start = whiten * spread  # in units of each feature's own spread
    metric, target = start.clone().requires_grad_(), torch.zeros_like(mean).requires_grad_()
    unit = torch.linspace(3e-3, 3e-4, steps)
    optimizer = torch.optim.Adam([metric, target], lr=3e-3)
    good, bad = ((f - mean) / spread for f in (good, bad))
    for step in tqdm(range(steps), desc="metric"):
        optimizer.param_groups[0]["lr"] = float(unit[step])
        batch = torch.randint(len(good), (512,), generator=g)
        margin = [natural_scene.block_scores(f[batch], metric, target).mean(1) for f in (good, bad)]
        loss = F.softplus(8 * (margin[1] - margin[0])).mean() + 1e-4 * (metric - start).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric, target = metric.detach() / spread, mean + target.detach() * spread
    scale = -natural_scene.block_scores(clean, metric, target).mean()
    return (metric / scale).contiguous(), target  # photos at -1 on average


def ranking(crops: Tensor, metric: Tensor, target: Tensor, g: torch.Generator) -> dict[str, float]:
    """Share of crops that score above their distorted copy, by distortion and strength."""

    def score(x: Tensor) -> Tensor:
        return natural_scene.block_scores(natural_scene.features(x), metric, target).mean(1)

    clean = score(crops)
    return {
        f"{name} {u:.1f}": float((score(_distorted(crops, name, u, g)) < clean).float().mean())
        for name in DISTORTIONS
        for u in (0.1, 0.4, 0.8)
    }


if __name__ == "__main__":
    run(main)
