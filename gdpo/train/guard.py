"""A guard against reward hacking: scores of held-out pictures, limits to their change, and the best checkpoint apart.

    guard: {lattice_artefact: +10%, psnr_y: -0.3, brisque: log}

A limit is a change for the worse, absolute or in percent: from the start where training tunes a finished model (gdpo),
else from the best value so far. What was measured is in metrics.jsonl (`guard/NAME`), and all that the guard decides
follows from these rows: a resumed run decides the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from gdpo.photos.dataset import Batch
from gdpo.scores.registry import SCORES, find
from gdpo.train import checkpoint as checkpoints
from gdpo.train.config import TrainConfig
from gdpo.train.methods.base import Method
from gdpo.train.record import Record
from gdpo.train.state import State

FOLDER = "best"  # in the run's folder: the best checkpoint
_TAG = "guard/"
Basis = Literal["start", "best"]


@dataclass(frozen=True)
class Limit:
    """How much worse a score may become; `worst` None: it is only logged."""

    name: str
    better: int
    worst: float | None
    percent: bool

    @classmethod
    def of(cls, name: str, allowed: float | str) -> Limit:
        """Read an entry of the option.

        Raises:
            ValueError: an unknown score, one that is no score of single pictures, or a change for the better.
        """
        name, score = find(name, "score of guard")
        if score.build is None:
            raise ValueError(f"guard cannot take {name}: it is a score of groups of samples")
        text = str(allowed).strip()
        if text == "log":
            return cls(name, score.better, None, False)
        example = f"{'-' if score.better > 0 else '+'}0.3, {'-' if score.better > 0 else '+'}10% or log"
        wrong = f"guard.{name} must be a change for the worse, such as {example}; got {allowed!r}"
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            raise ValueError(wrong) from None
        if not math.isfinite(value) or value * score.better >= 0:
            raise ValueError(wrong)
        return cls(name, score.better, value, text.endswith("%"))

    def broken(self, value: float, basis: float, of: Basis) -> str | None:
        """One line where `value` is beyond the limit, else None."""
        if self.worst is None:
            return None
        allowed = abs(basis) * self.worst / 100 if self.percent else self.worst
        if (value - (basis + allowed)) * self.better >= 0:
            return None
        unit = f"{self.worst:+g}{'%' if self.percent else ''}"
        return f"{self.name} is {value:.4g}, {value - basis:+.4g} from {basis:.4g} ({of}); the limit is {unit}"


@dataclass(frozen=True)
class Verdict:
    """`best`: the step of the best checkpoint, or None; `broken`: the limits beyond which the last evaluation lies."""

    best: int | None
    broken: list[str]


def judge(rows: list[dict[str, Any]], limits: list[Limit], basis: Basis, by: str) -> Verdict:
    """Go through the evaluations of a run, in order.

    Args:
        by: the score of which the highest (or lowest) makes a checkpoint the best, among those within all limits;
            "last" takes the last of them.
    """
    start: dict[str, float] = {}
    best, best_value, broken = None, -math.inf, []
    for row in rows:
        values = {k.removeprefix(_TAG): float(v) for k, v in row.items() if k.startswith(_TAG)}
        known = [limit for limit in limits if limit.name in values]
        if not known:
            continue
        lines = [limit.broken(values[limit.name], start.get(limit.name, values[limit.name]), basis) for limit in known]
        broken = [line for line in lines if line]
        for limit in known:
            worth = values[limit.name] * limit.better
            if limit.name not in start or (basis == "best" and worth > start[limit.name] * limit.better):
                start[limit.name] = values[limit.name]
        value = values[by] * SCORES[by].better if by in values else best_value
        if not broken and value >= best_value:
            best, best_value = row["step"], value
    return Verdict(best, broken)


class Guard:
    """Looks at held-out pictures every so many steps. All processes make one; the main one measures.

    Raises:
        ValueError, Unavailable: the options, or a score that cannot be computed here.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, batch: Batch | None) -> None:
        self.config, self.accelerator = config, accelerator
        self.root = Path(config.output_dir)
        self.limits = [Limit.of(name, allowed) for name, allowed in config.guard.items()]
        self.every = (config.guard_steps or config.validation_steps) if self.limits else 0
        self.main = accelerator.is_main_process
        self.batch = None
        if self.every and self.main:
            if batch is None:
                raise ValueError("guard needs held-out pictures: guard_images must be at least 1")
            self.batch = batch._replace(hr=batch.hr.to(accelerator.device))
            self.scores = {limit.name: SCORES[limit.name].build for limit in self.limits}
            self.compute = {name: build(accelerator.device) for name, build in self.scores.items() if build}

    def due(self, step: int) -> bool:
        """Whether this step is looked at: the start, every so many steps, and the last."""
        return self.every > 0 and (step % self.every == 0 or step == self.config.max_train_steps)

    def look(self, state: State, method: Method, record: Record) -> bool:
        """After the checkpoint of a step: measure, keep the best apart. Returns whether the run must end here.

        The same in all processes.
        """
        if not self.due(state.step):
            return False
        ends = False
        if self.main:
            with state.averaged(), torch.no_grad():
                record.row({"step": state.step, **self._measure(method)})
            verdict = self.verdict(record, method)
            if verdict.best == state.step and not (self.root / FOLDER / f"checkpoint-{state.step:07d}").exists():
                state.save(self.root / FOLDER, 1)
            for line in verdict.broken:
                record.say(f"guard, step {state.step}: {line}")
            ends = bool(verdict.broken) and self.config.guard_action == "stop"
        if self.accelerator.num_processes > 1:
            told = torch.tensor(float(ends), device=self.accelerator.device)
            ends = bool(self.accelerator.reduce(told, "sum"))
        return ends

    def verdict(self, record: Record, method: Method) -> Verdict:
        """What follows from the rows up to now."""
        return judge(record.rows(), self.limits, method.guarded_from, self.config.guard_best)

    def _measure(self, method: Method) -> dict[str, float]:
        """guard/NAME: means over the held-out pictures; drift/pixels: how far they moved, in 8-bit levels."""
        assert self.batch is not None
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.compute}
        moved: list[torch.Tensor] = []
        for i in range(len(self.batch.samples)):
            one = single(self.batch, i)
            picture = method.restored(one).float().clamp(-1, 1)
            for name, score in self.compute.items():
                found[name].append(score(picture / 2 + 0.5, one.hr).flatten().double().mean())
            if method.guarded_from == "start":
                before = method.restored(one, reference=True).float().clamp(-1, 1)
                moved.append((127.5 * (picture - before)).double().square().mean())
        values = {f"{_TAG}{name}": float(torch.stack(v).mean()) for name, v in found.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} on the held-out pictures; take another score, or larger crops")
        if moved:
            values["drift/pixels"] = float(torch.stack(moved).mean().sqrt())
        return values

    def finish(self, state: State, method: Method, record: Record) -> None:
        """Become the best checkpoint, of which the model at the end is made. Call it on the main process."""
        if not self.every:
            return
        best = self.verdict(record, method).best
        folder = self.root / FOLDER / f"checkpoint-{best or 0:07d}"
        if best is None or not folder.is_dir():
            record.say("guard: no checkpoint within the limits is kept; the model is that of the last step")
            return
        if best != state.step:
            state.restore(folder, checkpoints.load(folder))
        record.say(f"guard: the best checkpoint is {folder}, and the model is made of it")


def single(batch: Batch, i: int) -> Batch:
    """The i-th picture of a batch, as a batch."""
    captions = None if batch.captions is None else [batch.captions[i]]
    real = {0: batch.real[i]} if i in batch.real else {}
    return batch._replace(
        names=[batch.names[i]], captions=captions, samples=[batch.samples[i]], hr=batch.hr[i : i + 1], real=real
    )
