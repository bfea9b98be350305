"""What a person sees of a run: lines on the terminal, metrics.jsonl and the tracker, sheets, curves."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from engine.io.files import atomic_write, naming
from gdpo.photos.dataset import Batch
from gdpo.train import checkpoint as checkpoints
from gdpo.train import pictures
from gdpo.train.config import TrainConfig
from gdpo.train.methods.base import Method
from gdpo.train.setup import environment
from gdpo.train.state import State, flat
from gdpo.train.tracker import Tracker


class Record:
    """Writes to the run's folder; on the main process alone."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, validation: Batch | None):
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        self.root = Path(config.output_dir)
        self.validation = validation and validation._replace(hr=validation.hr.to(accelerator.device))
        self.tracker = Tracker(accelerator, config.report_to, self.root)
        self.bar: Any = None

    def start(self, step: int) -> None:
        """Write what the run is made with, drop rows that come after `step`, start the tracker and the progress bar."""
        if self.main:
            config = asdict(self.config)
            atomic_write(self.root / "config.json", json.dumps(config, indent=1) + "\n")
            made_with = json.dumps(environment(self.accelerator), indent=1)
            atomic_write(self.root / "environment.json", made_with + "\n")
            before = pictures.read_metrics(self.root / "metrics.jsonl")
            self._cut_metrics(step)
            same_course = self.config.resume_from_checkpoint in checkpoints.NEWEST
            self.tracker.start(step, flat(config), before if same_course else self._rows_until(step), same_course)
        steps = self.config.max_train_steps
        self.bar = tqdm(initial=step, total=steps, unit="step", disable=not self.main, file=sys.stderr)

    def say(self, line: str) -> None:
        """A line on the terminal, above the progress bar."""
        if self.main:
            tqdm.write(line, file=sys.stderr)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a row to metrics.jsonl and hand it to the tracker; the progress bar goes on by one."""
        self.bar.update()
        self.bar.set_postfix({k: f"{metrics[k]:.4g}" for k in ("loss", "reward", "grad_norm") if k in metrics})
        if self.main and (step % self.config.logging_steps == 0 or step == self.config.max_train_steps):
            self.row({"step": step, **metrics})

    def sheet_is_due(self, step: int) -> bool:
        """Whether this process draws a sheet after this step; the last one is drawn at the end."""
        every = self.config.validation_steps
        return self.main and every > 0 and 0 < step < self.config.max_train_steps and step % every == 0

    def sheet(self, state: State, method: Method) -> None:
        """Draw sheets/step-STEP.png of the held-out pictures, and log its figures."""
        if self.validation is None:
            return
        with state.averaged(), torch.no_grad():
            columns, figures = method.preview(self.validation)
            group = method.group(self.validation)
        for name, stem, shown in (("sheet", "step", columns), ("group", "group", group)):
            if shown:
                page = pictures.sheet(shown, self.root / "sheets" / f"{stem}-{state.step:07d}.png")
                self.tracker.picture(name, page, state.step)
        if figures:
            self.row({"step": state.step, **figures})

    def end(self) -> None:
        """Draw the curves and name what there is."""
        if self.main:
            self.tracker.end()
            pictures.curves(self.root / "metrics.jsonl", self.root / "curves.png")
            self.say(f"trained model: {self.root}/model; curves: {self.root}/curves.png; sheets: {self.root}/sheets")

    def row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl, and hand it to the tracker."""
        path = self.root / "metrics.jsonl"
        with naming(path), open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
        self.tracker.row(row)

    def rows(self) -> list[dict[str, Any]]:
        """What was logged up to now."""
        return pictures.read_metrics(self.root / "metrics.jsonl")

    def _cut_metrics(self, first: int) -> None:
        """Drop rows that a killed run wrote after the checkpoint from which this one goes on."""
        rows = self._rows_until(first)
        atomic_write(self.root / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))

    def _rows_until(self, step: int) -> list[dict[str, Any]]:
        """The rows that stay. A sheet comes after the checkpoint of its step and is drawn again, so its row goes."""
        return [r for r in self.rows() if r["step"] < step or (r["step"] == step and "step_time" in r)]
