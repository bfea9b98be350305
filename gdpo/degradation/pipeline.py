"""HR crops to the LR images that a camera, an application and a network might have made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gdpo.degradation.blur import RADIUS, blur
from gdpo.degradation.config import DegradationConfig
from gdpo.degradation.draw import PassDraw, draw_sample
from gdpo.degradation.jpeg import SMALLEST, jpeg
from gdpo.degradation.noise import add_noise, draw_field
from gdpo.degradation.resize import resize
from gdpo.degradation.workers import map_samples
from gdpo.randomness import uniform

Images = list[torch.Tensor]  # fp32 [1,3,h,w] each; within a pass every sample has its own size


class Degradation:
    """The second-order process of Real-ESRGAN (arXiv 2107.10833), or a milder one, on the images' device.

        degrade = Degradation(DegradationConfig())
        lr, lr_up = degrade(hr, seed=0, samples=range(first, first + len(hr)))

    What happens to a sample is a function of (seed, sample) alone: neither the other samples of the batch nor the step,
    process or device change it. On a CPU the pixels are the same to the bit, too; on a GPU the last bit of a float may
    differ from the CPU's and turn the rounding of a pixel before JPEG.

    Differs from Real-ESRGAN: sizes, filters, noise and order are drawn for each sample (there: for a batch); JPEG
    qualities are whole numbers and the pixels are rounded to 8 bit before JPEG, as real files are; resizes map pixels
    by the ratio of the whole sizes; the HR image is not sharpened first.
    """

    def __init__(self, config: DegradationConfig | None = None):
        self.config = config or DegradationConfig()
        self.recipe = self.config.recipe()
        scale, jpeg = self.config.scale, self.config.jpeg
        self.others = [
            Degradation(DegradationConfig(preset=name, scale=scale, jpeg=jpeg))  # type: ignore[arg-type]
            for name in self.config.mix
        ]
        self.smallest_side: int = max([self._smallest_side(), *(other.smallest_side for other in self.others)])

    def __call__(
        self, hr: torch.Tensor, *, seed: int, samples: Sequence[int], step: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Degrade a batch.

        Args:
            hr: [B,3,H,W] in [0,1], floating; H and W multiples of the scale, not under `smallest_side`.
            seed: the run's seed.
            samples: B global sample indices: each names one crop in one step of the run.
            step: accepted so that all draws of a step are called alike, and not used: `samples` tells steps apart, and
                a validation sample is to be degraded the same way at every step.

        Returns:
            lr fp32 [B,3,H/scale,W/scale], exact 8-bit values in [0,1], and lr_up fp32 [B,3,H,W] in [0,1]: lr resized
            back with a filter drawn for each sample.

        Raises:
            TypeError, ValueError: hr or samples are not as above.
        """
        self._check(hr, samples)
        hr, samples = hr.detach().float().contiguous(), [int(sample) for sample in samples]
        if hr.device.type != "cpu":
            if not self.others:
                return self._degrade(hr, seed, samples)
            alone = [self._alone(hr, seed, samples, i) for i in range(len(samples))]
        else:
            alone = map_samples(lambda i: self._alone(hr, seed, samples, i), len(samples))
        lr, lr_up = zip(*alone)
        return torch.cat(lr), torch.cat(lr_up)

    def preset_of(self, seed: int, sample: int) -> str:
        """Which preset degrades this sample: the config's own, or one of its mix."""
        return self._of(seed, sample).config.preset

    def _of(self, seed: int, sample: int) -> Degradation:
        shares = list(self.config.mix.values())
        position = uniform(seed, "degradation preset", sample) * (1 + sum(shares)) - 1 if shares else -1.0
        for other, share in zip(self.others, shares):
            if position < 0:
                break
            position -= share
            if position < 0:
                return other
        return self

    def upsample(self, lr: torch.Tensor) -> torch.Tensor:
        """lr [B,3,h,w] in [0,1] to [B,3,h*scale,w*scale] as inference does it: bicubic a=-0.5, clipped to [0,1]."""
        size = (lr.shape[2] * self.config.scale, lr.shape[3] * self.config.scale)
        with torch.autocast(lr.device.type, enabled=False):
            return resize(lr.float(), size, "bicubic_antialias").clamp(0, 1)

    def _alone(self, hr: torch.Tensor, seed: int, samples: list[int], i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of(seed, samples[i])._degrade(hr[i : i + 1], seed, samples[i : i + 1])

    @torch.no_grad()
    def _degrade(self, hr: torch.Tensor, seed: int, samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(hr.device.type, enabled=False):
            return self._chain(hr, seed, samples)

    def _chain(self, hr: torch.Tensor, seed: int, samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        size = hr.shape[2], hr.shape[3]
        small = size[0] // self.config.scale, size[1] // self.config.scale
        draws = [draw_sample(self.recipe, seed, sample) for sample in samples]
        images = list(hr.split(1))

        count = len(self.recipe.passes)
        for number in range(count):
            last = number == count - 1
            steps = [draw.passes[number] for draw in draws]
            images = blur(images, [step.kernel for step in steps])
            images = _resized(images, steps, small if last else size)
            images = _with_noise(images, steps, [(seed, "degradation noise", sample, number) for sample in samples])
            now = [not last or not draw.jpeg_last for draw in draws]
            images = self._jpeg(images, [step.quality for step in steps], now)

        images = [resize(image, small, draw.final_mode) for image, draw in zip(images, draws)]
        images = blur(images, [draw.final_sinc for draw in draws])
        if count:
            images = self._jpeg(images, [draw.passes[-1].quality for draw in draws], [d.jpeg_last for d in draws])
        lr = (torch.cat(images) * 255).round().clamp(0, 255) / 255
        lr_up = [resize(image, size, draw.upsample_mode) for image, draw in zip(lr.split(1), draws)]
        return lr, torch.cat(lr_up).clamp(0, 1)

    def _jpeg(self, images: Images, qualities: list[int], now: list[bool]) -> Images:
        """The images whose turn it is, compressed; the others as they are."""
        compressed = iter(
            jpeg(
                [image for image, due in zip(images, now) if due],
                [quality for quality, due in zip(qualities, now) if due],
                self.config.jpeg,
            )
        )
        return [next(compressed) if due else image for image, due in zip(images, now)]

    def _smallest_side(self) -> int:
        """The least side of an HR image that every draw can work on."""
        passes, scale = self.recipe.passes, self.config.scale
        needed = [scale]
        if passes:  # a border can only be reflected into an image that is larger than the border
            needed.append(RADIUS + 1)
            needed.append(scale * math.ceil(SMALLEST / passes[-1].resize_range[0]))
        needed += [math.ceil((RADIUS + 1) / before.resize_range[0]) for before in passes[:-1]]
        if self.recipe.final_sinc_probability:
            needed.append((RADIUS + 1) * scale)
        return max(needed)

    def _check(self, hr: torch.Tensor, samples: Sequence[int]) -> None:
        scale, least = self.config.scale, self.smallest_side
        if not isinstance(hr, torch.Tensor) or not hr.is_floating_point():
            got = hr.dtype if isinstance(hr, torch.Tensor) else type(hr).__name__
            raise TypeError(f"hr must be a floating tensor with values in [0,1]; got {got}")
        if hr.ndim != 4 or hr.shape[1] != 3 or hr.shape[0] < 1:
            raise ValueError(f"hr must be [B,3,H,W]; got {tuple(hr.shape)}")
        if hr.shape[2] % scale or hr.shape[3] % scale or min(hr.shape[2:]) < least:
            raise ValueError(
                f"hr must have a height and width that are multiples of {scale} and at least {least}; "
                f"got {hr.shape[2]}x{hr.shape[3]}: crop or pad it"
            )
        low, high = float(hr.detach().amin()), float(hr.detach().amax())
        if not (low >= 0 and high <= 1):  # written so that NaN is refused, too
            raise ValueError(f"hr must lie in [0,1]; got values from {low:g} to {high:g}")
        if len(samples) != hr.shape[0]:
            raise ValueError(f"samples must name one global sample index per image, {hr.shape[0]}; got {len(samples)}")


def _resized(images: Images, steps: list[PassDraw], size: tuple[int, int]) -> Images:
    """Each image resized to its own share of `size` (at least one pixel)."""
    return [
        resize(image, (max(1, int(size[0] * step.scale)), max(1, int(size[1] * step.scale))), step.resize_mode)
        for image, step in zip(images, steps)
    ]


def _with_noise(images: Images, steps: list[PassDraw], keys: list[tuple[int | str, ...]]) -> Images:
    """Each image with its own noise; the fields are drawn on the CPU and travel to the device together."""
    fields = [draw_field(step.noise, *image.shape[2:], *key) for image, step, key in zip(images, steps, keys)]
    device = images[0].device
    if device.type != "cpu":
        packed = torch.cat([field.flatten() for field in fields]).to(device)
        parts = packed.split([field.numel() for field in fields])
        fields = [part.view(field.shape) for part, field in zip(parts, fields)]
    return [add_noise(image, step.noise, field) for image, step, field in zip(images, steps, fields)]
