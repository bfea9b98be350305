"""All that a run is at a step: what is trained, its optimiser and its average; saved in a checkpoint and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gdpo.train import checkpoint as checkpoints
from gdpo.train.checkpoint import Checkpoint, Damaged, Facts
from gdpo.train.config import TrainConfig
from gdpo.train.methods.base import Method

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


@dataclass
class State:
    """A run after `step` optimiser steps.

    Attributes:
        step: optimiser steps done.
        parameters: what is trained, "GROUP/NAME" -> parameter.
        optimizer: AdamW, wrapped by accelerate; a group of parameters for each of the method's.
        average: the parameters' exponential moving average; empty where there is none.
        scaler: of the loss in fp16, else None.
        identity: what a run that goes on from here must share with this one: options, data, samples per step.
    """

    step: int
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    average: dict[str, torch.Tensor]
    scaler: Any
    identity: dict[str, Any]

    @classmethod
    def fresh(cls, config: TrainConfig, accelerator: Accelerator, method: Method, fingerprint: str) -> State:
        """Before the first step. `fingerprint`: of the data."""
        parameters = {f"{g}/{n}": p for g, (_, ps) in method.groups.items() for n, p in ps.items()}
        groups = [{"params": list(p.values()), "lr": rate} for rate, p in method.groups.values()]
        betas = (config.adam_beta1, config.adam_beta2)
        adamw = torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, weight_decay=config.adam_weight_decay)
        average = {k: p.detach().clone() for k, p in parameters.items()} if config.ema_decay else {}
        identity = {
            "identity": config.identity(),
            "data": fingerprint,
            "samples_per_step": samples_per_step(config, accelerator),
        }
        optimizer = accelerator.prepare_optimizer(adamw)
        return cls(0, parameters, optimizer, average, accelerator.scaler, identity)

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: the parameters, AdamW's two moments, the average."""
        return sum(p.numel() for p in self.parameters.values()) * 4 * (4 if self.average else 3)

    def update_average(self, most: float) -> None:
        """After a step: decay by `most`, or less where the average is young, so that it forgets its start faster."""
        if self.average:
            decay = min(most, self.step / (9 + self.step))
            values = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the trained weights are their moving average (where there is one)."""
        own = {k: p.detach().clone() for k, p in self.parameters.items()} if self.average else {}
        with torch.no_grad():
            for k in own:
                self.parameters[k].copy_(self.average[k])
        try:
            yield
        finally:
            with torch.no_grad():
                for k, value in own.items():
                    self.parameters[k].copy_(value)

    # ---- checkpoints

    def save(self, root: Path, keep: int) -> Path:
        """Write root/checkpoint-STEP; all but the newest `keep` go."""
        moments = {
            f"{key}/{part}": value.detach().cpu()
            for key, p in self.parameters.items()
            for part, value in self.optimizer.state.get(p, {}).items()
        }
        tensors = {"trainable": {k: p.detach().cpu() for k, p in self.parameters.items()}, "optimizer": moments}
        if self.average:
            tensors["ema"] = {k: p.cpu() for k, p in self.average.items()}
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return checkpoints.save(root, Checkpoint(tensors, Facts(self.step, **self.identity, scaler=scaler)), keep)

    def check_fits(self, folder: Path, found: Checkpoint) -> None:
        """Find out whether `restore` can take a checkpoint that was made with the same options.

        Raises:
            Damaged: names the file and the first tensor that is another than this run's.
        """
        for stem in ("trainable", "ema") if self.average else ("trainable",):
            saved = found.tensors.get(stem, {})
            wrong = [k for k, p in self.parameters.items() if k not in saved or not _alike(saved[k], p)]
            if wrong := wrong + [k for k in saved if k not in self.parameters]:
                raise Damaged(f"{folder}/{stem}.safetensors does not fit this model (first: {wrong[0]})")
        moments = found.tensors["optimizer"]
        known = {f"{key}/{part}": p for key, p in self.parameters.items() for part in _MOMENTS}
        for name in moments:
            key = name.rpartition("/")[0]
            whole = all(f"{key}/{part}" in moments for part in _MOMENTS)
            if name not in known or not whole or not _alike(moments[name], known[name], name.endswith("/step")):
                raise Damaged(f"{folder}/optimizer.safetensors does not fit this model (first: {name})")
        if self.scaler is not None and (found.state.scaler or {}).keys() != self.scaler.state_dict().keys():
            raise Damaged(f"{folder}/state.json: scaler must have {', '.join(self.scaler.state_dict())}")

    def restore(self, folder: Path, found: Checkpoint) -> None:
        """Become what was saved.

        Raises:
            Damaged: see check_fits; nothing was changed.
        """
        self.check_fits(folder, found)
        weights, averages = found.tensors["trainable"], found.tensors.get("ema", {})
        moments = found.tensors["optimizer"]
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(weights[key])
                if self.average:
                    self.average[key].copy_(averages[key])
                if f"{key}/exp_avg" in moments:
                    self.optimizer.state[p] = {
                        part: moments[f"{key}/{part}"].to("cpu" if part == "step" else p.device) for part in _MOMENTS
                    }
        if self.scaler is not None:
            self.scaler.load_state_dict(found.state.scaler)
        self.step = found.state.step


def _alike(saved: torch.Tensor, parameter: torch.Tensor, scalar: bool = False) -> bool:
    return saved.is_floating_point() and saved.shape == (torch.Size() if scalar else parameter.shape)


def samples_per_step(config: TrainConfig, accelerator: Accelerator) -> int:
    """Batch x accumulation x processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


def check_same_run(folder: Path, saved: Facts, state: State, config: TrainConfig) -> str | None:
    """Refuse a checkpoint from which this run cannot go on. An option that it does not know has its default there.

    Returns: a line to say what changed that may, else None.

    Raises:
        ValueError: names the first difference.
    """
    new = flat(json.loads(json.dumps(state.identity["identity"])))
    old = flat(json.loads(json.dumps(type(config)().identity()))) | flat(saved.identity)
    changed = {key: f"{key}={value!r} (was {old.get(key)!r})" for key, value in new.items() if old.get(key) != value}
    for key in [key for key in changed if key not in config.changeable()]:
        raise ValueError(
            f"{folder} was made with {key}={old.get(key)!r}, now it is {new[key]!r}: a resumed run must keep it; "
            "start a new output_dir to change it"
        )
    told = [line for key, line in changed.items() if key in old]  # the end of a run counts with some schedules alone
    notes = [f"from step {saved.step + 1} on, {', '.join(told)}"] if told else []
    now = state.identity["samples_per_step"]
    if saved.samples_per_step != now:
        raise ValueError(
            f"{folder} took {saved.samples_per_step} samples per step (batch x accumulation x processes), now it is "
            f"{now}: keep the product"
        )
    if saved.data != state.identity["data"]:
        other = f"{folder} was trained on other crops than {config.data.folder} holds now"
        if not config.allow_data_change:
            raise ValueError(f"{other}; put them back, or go on with these: --allow_data_change true")
        notes.append(f"{other}; going on with these, from the next sample number")
    return "; ".join(notes) or None


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is no number, text or None becomes JSON."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool, type(None))) else json.dumps(value)
    return out


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step as a share of the peak: a pure function of the step, so nothing to resume."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.lr_scheduler == "linear" else 1.0
