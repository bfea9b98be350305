"""The one training loop: batches, steps, gradients across processes, checkpoints, metrics, pictures.

A method (naosd.py, gdpo.py) supplies the step; everything here is the same for both. Gradients are averaged over
processes by one flat all-reduce instead of DistributedDataParallel: a step runs the same weights several times (policy,
reference, sampler; generator, teacher, fake) with adapters switched between, which DDP's hooks do not follow, and what
is trained is small.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from engine.io.cli import Terminated
from engine.io.files import atomic_write
from gdpo.generator import OneStepGenerator
from gdpo.photos.dataset import Batch, CropDataset, loader
from gdpo.train import checkpoint as checkpoints
from gdpo.train import pictures
from gdpo.train.config import TrainConfig
from gdpo.train.setup import environment

Metrics = dict[str, torch.Tensor]


class Method(Protocol):
    """A training method.

    `groups`: name -> (learning rate, parameters by name), one optimiser group each. `step` runs one micro-batch and
    calls `backward(loss)` itself, once or more, because adapters may have to be switched between. `save` writes the
    generator.
    """

    generator: OneStepGenerator
    groups: dict[str, tuple[float, dict[str, nn.Parameter]]]

    def step(self, batch: Batch, step: int, backward: Callable[[torch.Tensor], None]) -> Metrics: ...

    def preview(self, batch: Batch) -> tuple[list[tuple[str, torch.Tensor]], dict[str, float]]: ...

    def save(self, folder: Path) -> None: ...


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; training stopped and nothing was overwritten."""


class Loop:
    """Runs a method for `config.max_train_steps` steps. See `run`."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, dataset: CropDataset, validation: Batch | None):
        self.config, self.accelerator = config, accelerator
        self.dataset, self.validation = dataset, validation
        self.root = Path(config.output_dir)
        self.main = accelerator.is_main_process
        self.samples_per_step = (
            config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )  # fmt: skip
        self.stop_signal = 0

    # ---- the run, top to bottom

    def run(self, method: Method) -> None:
        """Train. Ends by saving the model; on Ctrl-C or SIGTERM saves a checkpoint and raises what ends the program."""
        config = self.config
        self.method = method
        self.parameters = {f"{g}/{n}": p for g, (_, ps) in method.groups.items() for n, p in ps.items()}
        self.optimizer = self._optimizer()
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()} if config.ema_decay else {}
        first_step = self._start()
        bar = tqdm(
            initial=first_step, total=config.max_train_steps, unit="step", disable=not self.main, file=sys.stderr
        )
        with self._signals(), bar:
            if first_step and self._sheet_is_due(first_step):
                self._sheet(first_step)  # a run that was stopped at this step saved it and drew none
            batches = loader(self.dataset, self._sample_lists(first_step), config.seed, config.data.num_workers)
            for step in range(first_step, config.max_train_steps):
                started = time.perf_counter()
                metrics = self._optimizer_step(batches, step)
                metrics["step_time"] = time.perf_counter() - started
                done = step + 1
                self._log(done, metrics)
                bar.update()
                bar.set_postfix({k: f"{metrics[k]:.4g}" for k in ("loss", "reward", "grad_norm") if k in metrics})
                stop = bool(metrics["stop_signal"])
                last = done == config.max_train_steps
                if self.main and (stop or last or done % config.checkpointing_steps == 0):
                    self._save_checkpoint(done)
                if stop:
                    self._end_by_signal(done)
                if self._sheet_is_due(done):
                    self._sheet(done)
        self._finish()

    def _optimizer_step(self, batches: Iterator[Batch], step: int) -> dict[str, float]:
        """One optimiser step: micro-batches, gradients averaged over processes, clip, update."""
        config, scaler = self.config, getattr(self.optimizer, "scaler", None)
        for group, (_, (rate, _)) in zip(self.optimizer.param_groups, self.method.groups.items()):
            group["lr"] = rate * self._rate(step)
        total: dict[str, torch.Tensor] = {}
        names: list[str] = []
        for _ in range(config.gradient_accumulation_steps):
            batch = next(batches)
            names += batch.names
            try:
                metrics = self.method.step(self._to_device(batch), step, self._backward)
            except ValueError as error:  # a score that is not finite, say
                raise ValueError(f"at step {step + 1}, samples {', '.join(batch.names)}: {error}") from error
            except torch.cuda.OutOfMemoryError as error:
                raise RuntimeError(f"at step {step + 1}, {self._smaller()}: {error}") from error
            for key, value in metrics.items():
                total[key] = total.get(key, 0.0) + value.detach().float().mean() / config.gradient_accumulation_steps
        total["stop_signal"] = torch.tensor(float(self.stop_signal), device=self.accelerator.device)
        total = self._average(total)
        values = dict(zip(total, torch.stack(list(total.values())).tolist()))
        if not math.isfinite(values["loss"]):
            self._stop_non_finite(step, names, values["loss"])
        self._reduce_gradients()
        if scaler is not None:
            scaler.unscale_(self.optimizer.optimizer)
        main_group = next(iter(self.method.groups))
        for name, (_, parameters) in self.method.groups.items():
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf)
            values["grad_norm" if name == main_group else f"grad_norm/{name}"] = float(norm)
            if scaler is None and not math.isfinite(float(norm)):
                self._stop_non_finite(step, names, float(norm), "gradient norm")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            decay = min(config.ema_decay, (1 + step) / (10 + step))  # a young average forgets its start faster
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return values

    # ---- pieces

    def _optimizer(self) -> Any:
        config = self.config
        groups = [{"params": list(p.values()), "lr": rate} for rate, p in self.method.groups.values()]
        betas = (config.adam_beta1, config.adam_beta2)
        adamw = torch.optim.AdamW(groups, betas=betas, eps=config.adam_epsilon, weight_decay=config.adam_weight_decay)
        return self.accelerator.prepare_optimizer(adamw)

    def _rate(self, step: int) -> float:
        """The learning rate of a step as a share of the peak: a pure function of the step, so nothing to resume."""
        config = self.config
        if step < config.lr_warmup_steps:
            return (step + 1) / config.lr_warmup_steps
        done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
        if config.lr_scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if config.lr_scheduler == "linear" else 1.0

    def _sample_lists(self, first_step: int) -> Iterator[list[int]]:
        """The global sample numbers of this process's micro-batches, in order."""
        config, n = self.config, self.config.train_batch_size
        for step in range(first_step, config.max_train_steps):
            mine = (
                step * self.samples_per_step + self.accelerator.process_index * n * config.gradient_accumulation_steps
            )
            for micro in range(config.gradient_accumulation_steps):
                yield list(range(mine + micro * n, mine + (micro + 1) * n))

    def _to_device(self, batch: Batch) -> Batch:
        return batch._replace(hr=batch.hr.to(self.accelerator.device, non_blocking=True))

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def _reduce_gradients(self) -> None:
        """Average gradients over processes, in one flat fp32 all-reduce."""
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([g.float().reshape(-1) for g in grads])
        flat = self.accelerator.reduce(flat, "mean")
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))

    def _smaller(self) -> str:
        """What of this configuration would need less memory."""
        config = self.config
        remedies = [] if config.model.gradient_checkpointing else ["--model.gradient_checkpointing true"]
        if config.train_batch_size > 1:
            remedies.append("a smaller --train_batch_size")
        if getattr(config, "sample_batch_size", 0) > 1:
            remedies.append("a smaller --sample_batch_size")
        if config.data.crop_size > 64:
            remedies.append("a smaller --data.crop_size")
        return f"{' or '.join(remedies) or 'a smaller model'} needs less memory"

    def _average(self, metrics: Metrics) -> Metrics:
        if self.accelerator.num_processes == 1:
            return metrics
        stacked = self.accelerator.reduce(torch.stack(list(metrics.values())), "mean")
        return dict(zip(metrics, stacked))

    def _stop_non_finite(self, step: int, names: list[str], value: float, what: str = "loss") -> None:
        kept = "there is no checkpoint yet"
        if checkpoints.exists(self.root):
            kept = f"the last checkpoint is {checkpoints.newest_valid(self.root)[0]}"
        raise NonFiniteLoss(
            f"the {what} is {value} at step {step + 1}; samples of process {self.accelerator.process_index}: "
            f"{', '.join(names)}. Nothing was updated or overwritten; {kept}. "
            "Try a lower learning_rate, mixed_precision no, or look at these samples"
        )

    # ---- start, resume, stop

    def _start(self) -> int:
        """Check the folder, write the config, resume if asked. Returns the first step to run."""
        config, wanted = self.config, self.config.resume_from_checkpoint
        if self.main:
            self._check_folder()
        self.accelerator.wait_for_everyone()
        if wanted is None and (checkpoints.exists(self.root) or (self.root / "model").exists()):
            raise ValueError(
                f"{self.root} already holds a run; continue it with --resume_from_checkpoint latest, "
                "or choose another --output_dir"
            )
        first = 0
        if wanted is not None and not (wanted == "auto" and not checkpoints.exists(self.root)):
            first = self._resume(wanted)
            self.accelerator.wait_for_everyone()  # all have read what is removed now
        if self.main:
            checkpoints.clean(self.root)
            if wanted in checkpoints.NEWEST:
                checkpoints.remove_after(self.root, first)
            elif wanted is not None:
                for folder in checkpoints.set_aside_after(self.root, first):
                    self._say(f"set aside, as this run goes on from an earlier step: {folder}")
            atomic_write(self.root / "config.json", json.dumps(asdict(config), indent=1) + "\n")
            atomic_write(self.root / "environment.json", json.dumps(environment(self.accelerator), indent=1) + "\n")
            self._cut_metrics(first)
            if config.report_to != "none":
                self.accelerator.init_trackers("gdpo", config=_flat(asdict(config)))
        if first >= config.max_train_steps:
            self._say(f"all {config.max_train_steps} steps are done already; raise max_train_steps to go on")
        return first

    def _check_folder(self) -> None:
        """Find an unwritable folder or a full disk now rather than at the first checkpoint."""
        self.root.mkdir(parents=True, exist_ok=True)
        atomic_write(self.root / ".probe", "")
        (self.root / ".probe").unlink()
        kept = self.config.checkpoints_total_limit + 1  # an old one goes when the new one is there
        trained = sum(p.numel() for p in self.parameters.values())
        checkpoint, model = trained * 4 * (4 if self.ema else 3), self.method.generator.saved_bytes()
        needed, free = kept * checkpoint + model + (16 << 20), shutil.disk_usage(self.root).free
        if free < needed:
            raise ValueError(
                f"output_dir {self.root} has {free >> 20} MiB free, but {kept} checkpoints and the trained model need "
                f"{needed >> 20} MiB; free some space or lower checkpoints_total_limit"
            )

    def _resume(self, wanted: str) -> int:
        folder, found, passed_over = checkpoints.find(self.root, wanted)
        for line in passed_over:
            self._say(f"passed over a damaged checkpoint, which will be removed: {line}")
        old, new = found.state["identity"], json.loads(json.dumps(self.config.identity()))
        changed = [k for k in _flat(new) if _flat(old).get(k) != _flat(new)[k]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{folder} was made with {key}={_flat(old).get(key)!r}, now it is {_flat(new)[key]!r}: a resumed run "
                "must keep it; start a new output_dir to change it"
            )
        if found.state["data"] != self.dataset.fingerprint:
            raise ValueError(f"{folder} was trained on other crops than {self.config.data.folder} holds now")
        if found.state["samples_per_step"] != self.samples_per_step:
            raise ValueError(
                f"{folder} took {found.state['samples_per_step']} samples per step (batch x accumulation x processes), "
                f"now it is {self.samples_per_step}: keep the product"
            )
        self._restore(folder, found)
        self._say(f"resumed from {folder}")
        return int(found.state["step"])

    def _restore(self, folder: Path, found: checkpoints.Checkpoint) -> None:
        def check(stem: str) -> dict[str, torch.Tensor]:
            saved = found.tensors.get(stem, {})
            wrong = [k for k, p in self.parameters.items() if k not in saved or saved[k].shape != p.shape]
            wrong += [k for k in saved if k not in self.parameters]
            if wrong:
                raise ValueError(
                    f"{folder}/{stem}.safetensors does not fit this model (first: {wrong[0]}): another model's?"
                )
            return saved

        weights = check("trainable")
        averages = check("ema") if self.ema else {}
        state = found.tensors["optimizer"]
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(weights[key])
                if self.ema:
                    self.ema[key].copy_(averages[key])
                if f"{key}/exp_avg" in state:
                    self.optimizer.state[p] = {
                        part: state[f"{key}/{part}"].to("cpu" if part == "step" else p.device)
                        for part in ("step", "exp_avg", "exp_avg_sq")
                    }
        if self.accelerator.scaler is not None and found.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(found.state["scaler"])

    def _save_checkpoint(self, done: int) -> None:
        optimizer = {
            f"{key}/{part}": value.detach().cpu()
            for key, p in self.parameters.items()
            for part, value in self.optimizer.state.get(p, {}).items()
        }
        tensors = {"trainable": {k: p.detach().cpu() for k, p in self.parameters.items()}, "optimizer": optimizer}
        if self.ema:
            tensors["ema"] = {k: p.cpu() for k, p in self.ema.items()}
        scaler = self.accelerator.scaler
        state = {
            "step": done,
            "identity": self.config.identity(),
            "data": self.dataset.fingerprint,
            "samples_per_step": self.samples_per_step,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        checkpoints.save(self.root, checkpoints.Checkpoint(tensors, state), self.config.checkpoints_total_limit)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step under way; a second one ends it at once."""

        def note(signum, frame):
            if self.stop_signal:
                raise KeyboardInterrupt if signum == signal.SIGINT else Terminated
            self.stop_signal = signum
            self._say("stopping after this step; a checkpoint will be saved (again to stop at once)")

        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _end_by_signal(self, done: int) -> None:
        self.accelerator.wait_for_everyone()
        self._say(f"saved checkpoint-{done:07d}; continue with --resume_from_checkpoint latest")
        raise Terminated if self.stop_signal == signal.SIGTERM else KeyboardInterrupt

    # ---- what a person looks at

    def _log(self, done: int, metrics: dict[str, float]) -> None:
        """Append a row to metrics.jsonl and hand it to the tracker."""
        if not self.main or (done % self.config.logging_steps and done != self.config.max_train_steps):
            return
        self._write_row({"step": done, **{k: v for k, v in metrics.items() if k != "stop_signal"}})

    def _write_row(self, row: dict[str, Any]) -> None:
        with open(self.root / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.config.report_to != "none":
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _cut_metrics(self, first: int) -> None:
        """Drop rows that a killed run wrote after the checkpoint from which this one goes on.

        A sheet comes after the checkpoint of its step and is drawn again, so its row goes as well.
        """
        path = self.root / "metrics.jsonl"
        rows = [
            r for r in pictures.read_metrics(path) if r["step"] < first or (r["step"] == first and "step_time" in r)
        ]
        atomic_write(path, "".join(json.dumps(r) + "\n" for r in rows))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the trained weights are their moving average (when there is one)."""
        own = {k: p.detach().clone() for k, p in self.parameters.items()} if self.ema else {}
        with torch.no_grad():
            for k in own:
                self.parameters[k].copy_(self.ema[k])
        try:
            yield
        finally:
            with torch.no_grad():
                for k, value in own.items():
                    self.parameters[k].copy_(value)

    def _sheet_is_due(self, done: int) -> bool:
        """Whether this process draws a sheet after this step; the last one is drawn at the end."""
        every = self.config.validation_steps
        return self.main and every > 0 and done % every == 0 and done < self.config.max_train_steps

    def _sheet(self, done: int) -> None:
        if self.validation is not None:
            with self._averaged(), torch.no_grad():
                columns, gains = self.method.preview(self._to_device(self.validation))
            pictures.sheet(columns, self.root / "sheets" / f"step-{done:07d}.png")
            if gains:
                self._write_row({"step": done, **gains})

    def _finish(self) -> None:
        """Save the trained model, a last sheet and the curves."""
        if self.main:
            self._sheet(self.config.max_train_steps)
            with self._averaged():
                self.method.save(self.root / "model")
            pictures.curves(self.root / "metrics.jsonl", self.root / "curves.png")
            self._say(f"trained model: {self.root}/model; curves: {self.root}/curves.png; sheets: {self.root}/sheets")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _say(self, line: str) -> None:
        if self.main:
            tqdm.write(line, file=sys.stderr)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool, type(None))) else json.dumps(value)
    return flat
