"""Look at what a degradation does to your photos, or write HR/LR pairs for evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.io.cli import Parser, run
from engine.io.images import READABLE, ImageError, Picture, check_writable, read_srgb, write_image
from gdpo.degradation.config import DegradationConfig
from gdpo.degradation.pipeline import Degradation

_MAX_PIXELS = 16_000_000  # a pass of a 16-megapixel photo takes some 5 GiB


def main() -> int:
    """Exit code 1 where some photos gave no pair."""
    parser = Parser(prog="python -m gdpo.degradation", description=__doc__)
    parser.add_argument("--in", type=Path, required=True, help="a photo, or a folder of photos", dest="source")
    parser.add_argument(
        "--out", type=Path, help="sheet to write: for each photo its centre and degraded versions of it"
    )
    parser.add_argument(
        "--pairs", type=Path, help="folder to write pairs of whole photos to: HR/NAME.png, LR/NAME.png (degraded)"
    )
    parser.add_argument("--size", type=int, default=192, help="side of the sheet's pictures, in pixels")
    parser.add_argument("--count", type=int, default=5, help="number of degraded versions of each photo on the sheet")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the degradation")
    parser.add_class_arguments(DegradationConfig, "degradation")
    args = parser.parse_args()
    if not args.out and not args.pairs:
        parser.error("give --out SHEET.png or --pairs FOLDER, or both")
    if args.count < 1 or args.size < 1:
        parser.error(f"--count and --size must be at least 1, got {args.count} and {args.size}")
    degrade = Degradation(DegradationConfig(**args.degradation.as_dict()))
    photos = _photos(args.source)
    if args.out:
        check_writable(args.out, 1, 1, alpha=False)
        with tqdm(photos, desc="sheet") as bar:
            rows = [_versions(degrade, photo, args.size, args.count, args.seed, n) for n, photo in enumerate(bar)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_image(args.out, Picture(_to_pixels(torch.cat(rows, 2))))
        print(f"{args.out}: {len(photos)} x (the photo, {args.count} degraded versions, bicubic to its size)")
    failed = 0
    if args.pairs:
        failed = _write_pairs(degrade, photos, args.pairs, args.seed)
        print(f"{args.pairs}: {len(photos) - failed} pairs in HR and LR")
    return int(bool(failed))


def _photos(source: Path) -> list[Path]:
    """The photo, or the photos of a folder by name."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--in {source}: no such file or folder")
    found = (path for path in source.iterdir() if path.suffix.lower() in READABLE and not path.name.startswith("."))
    photos = sorted(path for path in found if not path.is_dir())
    if not photos:
        raise ValueError(f"--in {source}: no photo in it ({' '.join(sorted(READABLE))})")
    return photos


def _read(path: Path) -> torch.Tensor:
    """fp32 [1,3,H,W] in [0,1], sRGB."""
    pixels = read_srgb(path, max_pixels=_MAX_PIXELS)
    values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def _to_pixels(image: torch.Tensor) -> np.ndarray:
    """uint8 [H,W,3] of [1,3,H,W] in [0,1]."""
    return (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _centre(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[:, :, top : top + height, left : left + width]


def _versions(degrade: Degradation, path: Path, size: int, count: int, seed: int, number: int) -> torch.Tensor:
    """A row of the sheet, [1,3,size,size*(count+1)]."""
    image = _read(path)
    if min(image.shape[2:]) < size:
        raise ValueError(f"{path}: {image.shape[3]}x{image.shape[2]} is smaller than --size {size}")
    hr = _centre(image, size, size)
    lr, _ = degrade(hr.expand(count, -1, -1, -1), seed=seed, samples=range(number * count, (number + 1) * count))
    return torch.cat([hr, *degrade.upsample(lr).split(1)], 3)


def _write_pairs(degrade: Degradation, photos: list[Path], folder: Path, seed: int) -> int:
    """HR (cut to whole multiples of the scale) and LR of each photo, as PNG of the photo's name.

    Returns: how many photos gave none; each is named, and the others keep their numbers and so their draws.
    """
    names = [path.stem for path in photos]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--pairs: two photos would be written as {twice[0]}.png; rename one")
    for kind in ("HR", "LR"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    scale, failed = degrade.config.scale, 0
    with tqdm(photos, desc="pairs") as bar:
        for number, path in enumerate(bar):
            try:
                image = _read(path)
                hr = _centre(image, image.shape[2] // scale * scale, image.shape[3] // scale * scale)
                lr, _ = degrade(hr, seed=seed, samples=[number])
            except ValueError as error:
                failed += 1
                reason = str(error) if isinstance(error, ImageError) else f"{path}: {error}"
                tqdm.write(f"left out: {reason}", file=sys.stderr)
                if failed == len(photos):
                    raise ValueError(f"--pairs: no photo of {len(photos)} gave a pair; the last: {reason}") from error
                continue
            write_image(folder / "HR" / f"{path.stem}.png", Picture(_to_pixels(hr)))
            write_image(folder / "LR" / f"{path.stem}.png", Picture(_to_pixels(lr)))
    return failed


if __name__ == "__main__":
    run(main)
