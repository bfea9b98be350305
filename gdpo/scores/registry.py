"""The rewards of GDPO: a registry of scores by name, each "fidelity" (full-reference) or "perceptual" (no-reference).

    rewards = build_rewards(["psnr_y", "naturalness", "my_module:my_score"], device="cuda")
    scores = {r.name: r.score(samples, target, statistics) for r in rewards}      # [B,G] fp32, higher is better
    require_finite(scores)

The kind decides the weight in the attribute-aware reward: fidelity counts by the smooth share of the picture,
perceptual by the textured share (paper, section 3.3).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from gdpo.kernels import AttributeStatistics

Kind = Literal["fidelity", "perceptual"]


class Score(Protocol):
    """What a reward computes: [B,G,3,H,W] and [B,3,H,W] in [-1,1], statistics of the group -> [B,G]."""

    def __call__(self, samples: Tensor, target: Tensor, statistics: AttributeStatistics) -> Tensor: ...


@dataclass(frozen=True)
class Reward:
    """A named score of samples; higher is better.

    Attributes:
        name: as in `reward_funcs`; also the tag in the log (`rewards/NAME/mean`).
        kind: "fidelity" or "perceptual".
        score: (samples [B,G,3,H,W] in [-1,1], target [B,3,H,W] in [-1,1], statistics) -> [B,G] fp32, without gradient.
            Raises ValueError, naming the reward, where a score has another shape or a user's function raises.
    """

    name: str
    kind: Kind
    score: Score


class _Entry(NamedTuple):
    kind: Kind
    build: Callable[[torch.device], Score]
    about: str


def _from_statistics(field: str) -> Callable[[torch.device], Score]:
    return lambda device: lambda samples, target, statistics: getattr(statistics, field)


def _per_image(score: Callable[[Tensor, Tensor], Tensor]) -> Score:
    """A score of pictures [N,3,H,W] against their targets as a score of groups."""

    def grouped(samples: Tensor, target: Tensor, statistics: AttributeStatistics) -> Tensor:
        targets = target.unsqueeze(1).expand_as(samples)
        values = score(samples.flatten(0, 1), targets.flatten(0, 1))
        n = samples.shape[:2].numel()
        if not isinstance(values, Tensor) or values.shape != (n,):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"it must return one number per picture, a tensor [{n}]; got {got}")
        return values.unflatten(0, samples.shape[:2])

    return grouped


def _metric(name: str, sign: int = 1, reference: bool = False, **options: str) -> Callable[[torch.device], Score]:
    """A function of gdpo.scores.metrics; `sign` -1 where less is better."""

    def build(device: torch.device) -> Score:
        metric = getattr(importlib.import_module("gdpo.scores.metrics"), name)

        def score(x: Tensor, y: Tensor) -> Tensor:
            x, y = ((p.float() / 2 + 0.5).clamp(0, 1) for p in (x, y))
            return sign * (metric(x, y, **options) if reference else metric(x, **options))

        return _per_image(score)

    return build


def _vgg(device: torch.device) -> Score:
    from gdpo.scores.features import PerceptualDistance

    distance = PerceptualDistance().to(device)
    return _per_image(lambda x, y: -distance(x, y))


def _pyiqa(name: str) -> Callable[[torch.device], Score]:
    """A no-reference metric of the optional package pyiqa, which says itself whether less is better."""

    def build(device: torch.device) -> Score:
        try:
            import pyiqa
        except Exception as error:  # pyiqa drags in torchvision, timm and more, which fail in ways of their own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ImportError(
                f"reward {name!r} needs the package pyiqa ({reason}); install it with: pip install 'gdpo-sr[iqa]'"
            ) from error
        try:
            metric = pyiqa.create_metric(name, device=device, as_loss=False)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RuntimeError(f"reward {name!r}: pyiqa could not load it or its weights ({reason})") from error
        sign = -1 if metric.lower_better else 1
        return _per_image(lambda x, _: sign * metric((x.float() / 2 + 0.5).clamp(0, 1)).flatten())

    return build


REGISTRY: dict[str, _Entry] = {
    "psnr_y": _Entry("fidelity", _from_statistics("psnr_y"), "PSNR of the luma, dB"),
    "region_fidelity": _Entry("fidelity", _from_statistics("fidelity"), "PSNR of the luma where the photo is smooth"),
    "region_detail": _Entry("perceptual", _from_statistics("detail"), "as much detail as the photo where it has some"),
    "ssim_y": _Entry("fidelity", _metric("ssim_y", reference=True), "structural similarity of the luma"),
    "vgg": _Entry("fidelity", _vgg, "minus the VGG16 feature distance"),
    "naturalness": _Entry("perceptual", _metric("naturalness"), "no-reference, offline, made for crops of 64 and more"),
    "niqe": _Entry(
        "perceptual", _metric("niqe", -1, model="photos-32"), "minus NIQE with blocks of 32 (model photos-32)"
    ),
    "piqe": _Entry("perceptual", _metric("piqe", -1), "minus PIQE; it rewards fine grids, so never alone"),
    "musiq": _Entry("perceptual", _pyiqa("musiq"), "MUSIQ (KonIQ), through pyiqa"),
    "maniqa": _Entry("perceptual", _pyiqa("maniqa"), "MANIQA (KonIQ), through pyiqa"),
    "maniqa-pipal": _Entry("perceptual", _pyiqa("maniqa-pipal"), "MANIQA (PIPAL), through pyiqa"),
}


def build_rewards(names: Sequence[str], device: str | torch.device = "cpu") -> list[Reward]:
    """The rewards of a configuration, in its order.

    Args:
        names: names of REGISTRY, or `module:function` of the user's own: function(samples [N,3,H,W] in [-1,1],
            target [N,3,H,W] in [-1,1]) -> [N], higher is better; an attribute `kind` ("fidelity" or "perceptual",
            the default) may be set on it.
        device: where the rewards' networks go.

    Raises:
        ValueError: an unknown or repeated name, or a module:function that is not there or not callable.
        ImportError, RuntimeError, FileNotFoundError: a package or weights are missing; the message says what to do.
    """
    if not names:
        raise ValueError(f"reward_funcs must name at least one of {', '.join(REGISTRY)}, or module:function")
    repeated = {n for n in names if list(names).count(n) > 1}
    if repeated:
        raise ValueError(f"reward_funcs names {sorted(repeated)[0]!r} more than once; use reward_weights instead")
    return [_build(name, torch.device(device)) for name in names]


def _build(name: str, device: torch.device) -> Reward:
    if ":" in name:
        kind, score = _users_own(name)
    elif name in REGISTRY:
        kind, score = REGISTRY[name].kind, REGISTRY[name].build(device)
    else:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(REGISTRY)}, or module:function of your own")
    return Reward(name, kind, _checked(name, score))


def _users_own(name: str) -> tuple[Kind, Score]:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module of the user's own can raise anything
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"reward {name!r} must be module:function, importable from here (PYTHONPATH): {reason}"
        ) from error
    kind = getattr(function, "kind", "perceptual")
    if not callable(function) or kind not in ("fidelity", "perceptual"):
        raise ValueError(f"reward {name!r} must be a function whose kind is fidelity or perceptual; got {kind!r}")
    return cast(Kind, kind), _per_image(function)


def _checked(name: str, score: Score) -> Score:
    """No gradient, fp32, [B,G]. The values are left to `require_finite`: looking at them makes the host wait."""

    @torch.no_grad()
    def checked(samples: Tensor, target: Tensor, statistics: AttributeStatistics) -> Tensor:
        if samples.ndim != 5 or target.shape != (samples.shape[0], *samples.shape[2:]):
            raise ValueError(
                f"reward {name!r}: samples must be [B,G,3,H,W] and target [B,3,H,W]; "
                f"got {tuple(samples.shape)} and {tuple(target.shape)}"
            )
        try:
            values = score(samples, target, statistics)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a function of the user's own can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"reward {name!r} failed ({reason}); GDPO_TRACEBACK=1 shows where") from error
        return values.float()

    return checked


def require_finite(scores: Mapping[str, Tensor]) -> None:
    """Refuse scores that are not finite. It is one host synchronisation, so call it when all kernels are queued.

    Args:
        scores: [B,G] of each reward, by its name.

    Raises:
        ValueError: a score is not finite; it names reward, image and sample.
    """
    if torch.stack([values.isfinite().all() for values in scores.values()]).all():
        return
    for name, values in scores.items():
        for image, sample in (~values.isfinite()).nonzero().tolist():
            raise ValueError(
                f"reward {name!r} is {float(values[image, sample])} for image {image}, sample {sample} of the batch"
            )
