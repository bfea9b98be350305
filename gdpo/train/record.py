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

from engine.io.files import atomic_write
from gdpo.photos.dataset import Batch
from gdpo.train import pictures
from gdpo.train.config import TrainConfig
from gdpo.train.methods.base import Method
from gdpo.train.setup import environment
from gdpo.train.state import State, flat


class Record:
    """Writes to the run's folder; on the main process alone."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, validation: Batch | None):
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        self.root = Path(config.output_dir)
        self.validation = validation and validation._replace(hr=validation.hr.to(accelerator.device))
        self.bar: Any = None

    def start(self, step: int) -> None:
        """Write what the run is made with, drop rows that come after `step`, start the tracker and the progress bar."""
        if self.main:
            config = asdict(self.config)
            atomic_write(self.root / "config.json", json.dumps(config, indent=1) + "\n")
            made_with = json.dumps(environment(self.accelerator), indent=1)
            atomic_write(self.root / "environment.json", made_with + "\n")
            self._cut_metrics(step)
            if self.config.report_to != "none":
                self.accelerator.init_trackers("gdpo", config=flat(config))
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
            self._write_row({"step": step, **metrics})

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
        pictures.sheet(columns, self.root / "sheets" / f"step-{state.step:07d}.png")
        if figures:
            self._write_row({"step": state.step, **figures})

    def end(self) -> None:
        """Draw the curves and name what there is."""
        if self.main:
            pictures.curves(self.root / "metrics.jsonl", self.root / "curves.png")
            self.say(f"trained model: {self.root}/model; curves: {self.root}/curves.png; sheets: {self.root}/sheets")

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
