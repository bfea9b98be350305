"""The tracker beside metrics.jsonl, through accelerate: one run there, however often it is stopped and resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from engine.io.files import atomic_write
from gdpo.model.parts import first_line

_PROJECT = "gdpo"
_REMEDIES = {
    "wandb": "log in with: wandb login, or set WANDB_MODE=offline",
    "tensorboard": f"its folder, RUN/{_PROJECT}, must be one that can be written",
}


class Tracker:
    """Rows and pictures of a run. Used on the main process alone; `kind` "none" takes them and does nothing.

    A tracker that fails after its start is named and left alone: the run goes on, and metrics.jsonl has everything.

    Args:
        accelerator: made with this kind of tracker.
        kind: report_to.
        root: the run's folder, which keeps the id of its wandb run in `wandb_id`.
    """

    def __init__(self, accelerator: Accelerator, kind: str, root: Path) -> None:
        self.accelerator, self.kind, self.root = accelerator, kind, root
        self._seen = -1  # steps up to this one are in the tracker already

    def start(self, step: int, config: dict[str, Any], before: list[dict[str, Any]], same_course: bool) -> None:
        """Begin after `step`.

        Args:
            config: options, flat.
            before: the rows of metrics.jsonl, also those that come after `step`, as a killed run leaves them.
            same_course: whether this run will log the same from `step` on as the one before it did.

        Raises:
            ValueError: the tracker does not start; the message says what to do.
        """
        if self.kind == "none":
            return
        try:
            self._start(step, config, before, same_course)
        except Exception as error:  # of another project
            raise ValueError(
                f"report_to {self.kind} does not start ({first_line(error)}); {_REMEDIES[self.kind]}; or report_to "
                "none (metrics.jsonl is written all the same)"
            ) from error

    def _start(self, step: int, config: dict[str, Any], before: list[dict[str, Any]], same_course: bool) -> None:
        options: dict[str, Any] = {}
        if self.kind == "tensorboard" and step:
            options["purge_step"] = step  # its pictures come again, and its row is written once more below
        if self.kind == "wandb":
            options = {"id": self._id(keep=step > 0 and same_course), "resume": "allow"}
        # tensorboard would make one more entry of the options at every start
        told = None if self.kind == "tensorboard" and step else config
        self.accelerator.init_trackers(_PROJECT, told, {self.kind: options})
        if self.kind == "wandb" and step and same_course:
            run = self.accelerator.get_tracker("wandb", unwrap=True)
            # Offline, nobody but metrics.jsonl knows; wandb takes no step that lies behind the last one.
            self._seen = max((r["step"] for r in before), default=-1) if run.offline else run.starting_step - 1
        if self.kind == "tensorboard":
            for row in before:
                if row["step"] == step and "step_time" in row:
                    self.row(row)

    def _id(self, keep: bool) -> str:
        """The id of the run there: as it was, or a new one."""
        file = self.root / "wandb_id"
        if not (keep and file.is_file()):
            atomic_write(file, f"{uuid4().hex[:12]}\n")
        return file.read_text().strip()

    def row(self, row: dict[str, Any]) -> None:
        """Figures of a step."""
        if self.kind != "none" and row["step"] > self._seen:
            with self._left_alone_if_it_fails():
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture of a step."""
        if self.kind == "none" or step <= self._seen:
            return
        with self._left_alone_if_it_fails():
            tracker: Any = self.accelerator.get_tracker(self.kind)
            if self.kind == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [picture]}, step=step)

    def end(self) -> None:
        """Nothing comes any more."""
        with self._left_alone_if_it_fails():
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers = []

    @contextmanager
    def _left_alone_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another project
            line = f"{self.kind} failed ({first_line(error)}); nothing more goes there, metrics.jsonl has everything"
            tqdm.write(line, file=sys.stderr)
            self.kind, self.accelerator.trackers = "none", []
