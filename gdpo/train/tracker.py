"""The tracker beside metrics.jsonl, through accelerate: one run there, however often it is stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate import Accelerator
from PIL import Image

from engine.io.files import atomic_write

_PROJECT = "gdpo"


class Tracker:
    """Rows and pictures of a run. Used on the main process alone; `kind` "none" takes them and does nothing.

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
        """
        if self.kind == "none":
            return
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
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture of a step."""
        if self.kind == "none" or step <= self._seen:
            return
        tracker: Any = self.accelerator.get_tracker(self.kind)
        if self.kind == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [picture]}, step=step)
