"""The rewards of GDPO: scores of the registry, or the user's own functions, of whole groups; higher is better.

rewards = build_rewards(["psnr_y", "naturalness", "my_module:my_score"], device="cuda")
scores = {r.name: r.score(samples, target, statistics) for r in rewards}      # [B,G] fp32
require_finite(scores)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from tqdm import tqdm

from gdpo.kernels import AttributeStatistics
from gdpo.scores.registry import SCORES, Kind, Score, Unavailable, find, one_line
from gdpo.scores.remote import Patience, RemoteReward


class GroupScore(Protocol):
    """What a reward computes: [B,G,3,H,W] and [B,3,H,W] in [-1,1], statistics (None for a server) -> [B,G]."""

    def __call__(self, samples: Tensor, target: Tensor, statistics: AttributeStatistics | None) -> Tensor: ...


@dataclass(frozen=True)
class Reward:
    """A named score of samples; higher is better.

    Attributes:
        name: as in `reward_funcs`; also the tag in the log (`rewards/NAME/mean`).
        kind: "fidelity" or "perceptual".
        score: (samples [B,G,3,H,W] in [-1,1], target [B,3,H,W] in [-1,1], statistics) -> [B,G] fp32, without gradient.
            Raises ValueError, naming the reward, where a score has another shape or a user's function raises.
        start: of a reward that another process computes: (samples, target) -> a function that waits for the scores.
    """

    name: str
    kind: Kind
    score: GroupScore
    start: Callable[[Tensor, Tensor], Callable[[], Tensor]] | None = None


def build_rewards(
    names: Sequence[str], device: str | torch.device = "cpu", patience: Patience | None = None
) -> list[Reward]:
    """The rewards of a configuration, in its order.

    Args:
        names: names of gdpo.scores.registry.SCORES, or `module:function` of the user's own: function(samples [N,3,H,W]
            in [-1,1], target [N,3,H,W] in [-1,1]) -> [N], higher is better; an attribute `kind` ("fidelity" or
            "perceptual", the default) may be set on it.
            With a true attribute `groupwise` it sees one whole group instead: function(samples [G,3,H,W], target
            [3,H,W]) -> [G]. Or `http://HOST:PORT/score/NAME`, which `python -m gdpo.rewards serve` answers.
        device: where the rewards' networks go.
        patience: with a reward over HTTP; None: the defaults of Patience.

    Raises:
        ValueError: an unknown or repeated name, or a module:function that is not there or not callable.
        Unavailable, FileNotFoundError: a package or weights are missing; the message says what to do.
    """
    if not names:
        raise ValueError(f"reward_funcs must name at least one of {', '.join(SCORES)}, or module:function")
    repeated = {n for n in names if list(names).count(n) > 1}
    if repeated:
        raise ValueError(f"reward_funcs names {sorted(repeated)[0]!r} more than once; use reward_weights instead")
    rewards = [_build(name, torch.device(device), patience or Patience()) for name in names]
    for i, reward in enumerate(rewards):
        if reward.name in [r.name for r in rewards[:i]]:
            raise ValueError(f"reward_funcs has {reward.name!r} twice, here and at a URL; drop one of them")
    return rewards


def _build(name: str, device: torch.device, patience: Patience) -> Reward:
    if name.startswith(("http://", "https://")):
        return _remote(name, patience)
    if ":" in name:
        kind, function = _users_own(name)
        shaped = _per_group if getattr(function, "groupwise", False) else _per_picture
        return Reward(name, kind, _checked(name, shaped(_copied(name, function))))
    if name == "niqe":
        raise ValueError(
            "reward 'niqe' is called 'niqe-32' now: NIQE with blocks of 32, as it always was in training "
            "(niqe, with blocks of 96, is a column of gdpo.evaluate)"
        )
    try:
        name, entry = find(name, "reward")
    except ValueError as error:
        raise ValueError(f"{error}, or module:function of your own") from None
    return Reward(name, entry.kind, _checked(name, _of_registry(name, entry, device)))


def _of_registry(name: str, entry: Score, device: torch.device) -> GroupScore:
    if entry.statistic is not None:  # also where it has a `build`: training has the statistics anyway
        field = entry.statistic
        return lambda samples, target, statistics: getattr(statistics, field)
    assert entry.build is not None  # an entry has one of the two, or both
    try:
        score = entry.build(device)
    except Unavailable as error:
        raise Unavailable(f"reward {name!r}: {error}") from error

    def in_unit_range(x: Tensor, y: Tensor) -> Tensor:
        x, y = ((p.float() / 2 + 0.5).clamp(0, 1) for p in (x, y))
        return entry.better * score(x, y)

    return _per_picture(in_unit_range)


def _per_picture(score: Callable[[Tensor, Tensor], Tensor]) -> GroupScore:
    """A score of pictures [N,3,H,W] in [-1,1] against their targets as a score of groups."""

    def grouped(samples: Tensor, target: Tensor, statistics: AttributeStatistics | None) -> Tensor:
        targets = target.unsqueeze(1).expand_as(samples)
        values = score(samples.flatten(0, 1), targets.flatten(0, 1))
        n = samples.shape[:2].numel()
        if not isinstance(values, Tensor) or values.shape != (n,) or values.is_complex():
            got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"it must return one number per picture, a tensor [{n}]; got {got}")
        return values.unflatten(0, samples.shape[:2])

    return grouped


def _per_group(score: Callable[[Tensor, Tensor], Tensor]) -> GroupScore:
    """A score of one group [G,3,H,W] against its target [3,H,W], -> [G], as a score of groups."""

    def grouped(samples: Tensor, target: Tensor, statistics: AttributeStatistics | None) -> Tensor:
        found = []
        for group, hr in zip(samples, target):
            values = score(group, hr)
            if not isinstance(values, Tensor) or values.shape != (len(group),) or values.is_complex():
                got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"it must return one number per sample of the group, [{len(group)}]; got {got}")
            found.append(values)
        return torch.stack(found)

    return grouped


# ---- over HTTP


def _remote(url: str, patience: Patience) -> Reward:
    remote = RemoteReward(url, patience)

    def start(samples: Tensor, target: Tensor) -> Callable[[], Tensor]:
        waiting = remote.start(samples, target)

        def scores() -> Tensor:
            try:
                return waiting()
            except ValueError as error:
                raise ValueError(f"reward {remote.name!r}: {error}") from error

        return scores

    return Reward(remote.name, remote.kind, lambda samples, target, statistics: start(samples, target)(), start)


# ---- the user's own


def _users_own(name: str) -> tuple[Kind, Callable[[Tensor, Tensor], Tensor]]:
    module_name, _, function_name = name.partition(":")
    try:
        with _settings_kept():
            function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a module of the user's own can raise anything
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"reward {name!r} must be module:function, importable from here (PYTHONPATH): {reason}"
        ) from error
    kind = getattr(function, "kind", "perceptual")
    if not callable(function):
        raise ValueError(f"reward {name!r} must be a function; got {type(function).__name__}")
    if kind not in ("fidelity", "perceptual"):
        raise ValueError(f"reward {name!r} must be a function whose kind is fidelity or perceptual; got {kind!r}")
    return cast(Kind, kind), function


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Inside, a stranger's code may change what holds for the whole process; afterwards it is as it was."""
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    folder = os.getcwd()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        os.chdir(folder)


def _copied(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Hand a function copies: what it writes into them, through torch or numpy, is seen by nobody else."""
    told = False

    def called(samples: Tensor, target: Tensor) -> Tensor:
        nonlocal told
        pictures = samples.clone(), target.clone()
        before = [p._version for p in pictures]
        with _settings_kept():
            values = function(*pictures)
        if not told and before != [p._version for p in pictures]:
            told = True
            line = f"reward {name!r} writes into its pictures (as x.mul_() or x[...] = do); it has copies of its own"
            tqdm.write(line, file=sys.stderr)
        return values

    return called


def _checked(name: str, score: GroupScore) -> GroupScore:
    """No gradient, fp32, [B,G]. The values are left to `require_finite`: looking at them makes the host wait."""

    @torch.no_grad()
    def checked(samples: Tensor, target: Tensor, statistics: AttributeStatistics | None) -> Tensor:
        if samples.ndim != 5 or target.shape != (samples.shape[0], *samples.shape[2:]):
            raise ValueError(
                f"reward {name!r}: samples must be [B,G,3,H,W] and target [B,3,H,W]; "
                f"got {tuple(samples.shape)} and {tuple(target.shape)}"
            )
        try:
            return score(samples, target, statistics).to(samples.device, torch.float32)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        except torch.cuda.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:  # a function of the user's own can raise anything
            raise ValueError(f"reward {name!r} failed ({one_line(error)}); GDPO_TRACEBACK=1 shows where") from error

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
