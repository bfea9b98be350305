"""The one training loop, for every method: start or resume, step, log, checkpoint, end. Read it from top to bottom.

The state is in state.py, one optimiser step in step.py, what a person sees in record.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from engine.io import cli
from engine.io.files import atomic_write, lock
from gdpo.photos.dataset import Batch, CropDataset, loader
from gdpo.photos.mixture import Mixture
from gdpo.scores.remote import STOPPING
from gdpo.train import checkpoint as checkpoints
from gdpo.train.checkpoint import Checkpoint
from gdpo.train.config import TrainConfig
from gdpo.train.guard import Guard
from gdpo.train.methods.base import Method
from gdpo.train.record import Record
from gdpo.train.state import State, check_same_run, samples_per_step
from gdpo.train.step import NonFiniteLoss, StepFailed, optimizer_step

_ENDING = 20.0  # seconds in which a run that was told to stop has ended


@contextmanager
def alone_in(root: Path, main: bool) -> Iterator[None]:
    """Inside, no other run writes to the folder: two would delete each other's checkpoints.

    One that is just ending, as a job that was started anew, is waited for.

    Raises:
        ValueError: another run is writing there, or it is not a folder.
    """
    if not main:
        yield
        return
    if not root.is_dir() and (root.exists() or root.is_symlink()):
        raise ValueError(f"output_dir must be a folder, or not exist yet; {root} is something else")
    root.mkdir(parents=True, exist_ok=True)
    path, until = root / ".lock", time.monotonic() + _ENDING
    while True:
        with open(path, "w") as file:
            locked = lock(file.fileno(), wait=False)
            if locked is not False and os.fstat(file.fileno()).st_nlink:  # else its owner has just removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        if time.monotonic() > until:
            raise ValueError(f"another run is writing to {root}; wait for it, or choose another output_dir")
        time.sleep(0.2)


def train_loop(
    config: TrainConfig,
    accelerator: Accelerator,
    method: Method,
    dataset: CropDataset | Mixture,
    validation: Batch | None,
    guard: Guard,
) -> None:
    """Train for `config.max_train_steps` steps, then save the model.

    Args:
        method: what is trained, and how.
        dataset: the crops; which of them a step sees depends on nothing but seed and sample number.
        validation: the held-out pictures of the before/after sheets.
        guard: what ends a run that is hacking its rewards, and keeps the best checkpoint.

    Raises:
        cli.Interrupted, cli.Terminated: Ctrl-C or SIGTERM, after the step under way and a checkpoint.
        Failed: a disk that is full or fails; the last checkpoint is kept and named.
        StepFailed: a picture, a score or the GPU's memory; the steps before are saved.
        NonFiniteLoss: the last checkpoint is kept.
        ValueError, FileNotFoundError: a folder, a disk or a checkpoint with which the run cannot start.
    """
    root, main = Path(config.output_dir), accelerator.is_main_process
    record = Record(config, accelerator, validation)

    # Start: from nothing, or from a checkpoint.
    state = State.fresh(config, accelerator, method, dataset.fingerprint)
    if main:
        check_folder(root, config, state, method)
    accelerator.wait_for_everyone()
    resume(root, config, accelerator, state, record)
    record.start(state.step)
    if state.step >= config.max_train_steps:
        record.say(f"all {config.max_train_steps} steps are done already; raise max_train_steps to go on")
    if record.sheet_is_due(state.step):
        record.sheet(state, method)  # a run that was stopped at this step saved it and drew none
    ends = guard.look(state, method, record)
    samples = sample_lists(config, accelerator, state.step)
    batches = loader(dataset, samples, config.seed, config.data.num_workers, config.data.on_error)

    # Train.
    with Stop(record.say) as stop, record.bar, disk_failures(root, state):
        while state.step < config.max_train_steps and not ends:
            started = time.perf_counter()
            try:
                figures = optimizer_step(config, accelerator, method, state, batches)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}. Nothing was updated or overwritten; {last_checkpoint(root)}") from error
            except StepFailed as error:
                saved = save_before_failing(root, config, accelerator, state, error.remedy)
                if stop.signal:  # it did not wait for what was away
                    record.say(f"{error}. {saved}")
                    stop.leave()
                raise StepFailed(f"{error}. {saved}") from error
            record.log(state.step, figures | {"step_time": time.perf_counter() - started})
            stopping = stop.agreed(accelerator)
            done = state.step == config.max_train_steps
            if main and (stopping or done or guard.due(state.step) or state.step % config.checkpointing_steps == 0):
                state.save(root, config.checkpoints_total_limit)
            if stopping:
                accelerator.wait_for_everyone()
                record.say(f"saved checkpoint-{state.step:07d}; continue with --resume_from_checkpoint latest")
                stop.leave()
            with look_failures(root, config, main, state):
                if record.sheet_is_due(state.step):
                    record.sheet(state, method)
                ends = guard.look(state, method, record)

    # End.
    if main:
        with disk_failures(root, state):
            if not record.sheet_is_due(state.step):  # else it was drawn before the guard ended the run
                with look_failures(root, config, main, state):
                    record.sheet(state, method)
            guard.finish(state, method, record)
            with state.averaged():
                method.save(root / "model")
            record.end()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def sample_lists(config: TrainConfig, accelerator: Accelerator, first_step: int) -> Iterator[list[int]]:
    """The global sample numbers of this process's micro-batches, in order."""
    n, micros = config.train_batch_size, config.gradient_accumulation_steps
    for step in range(first_step, config.max_train_steps):
        mine = step * samples_per_step(config, accelerator) + accelerator.process_index * n * micros
        for micro in range(micros):
            yield list(range(mine + micro * n, mine + (micro + 1) * n))


def check_folder(root: Path, config: TrainConfig, state: State, method: Method) -> None:
    """Find an unwritable folder or a full disk now rather than at the first checkpoint."""
    root.mkdir(parents=True, exist_ok=True)
    atomic_write(root / ".probe", "")
    (root / ".probe").unlink()
    kept = config.checkpoints_total_limit + 1 + bool(config.guard)  # an old one goes when the new one is there
    needed = kept * state.checkpoint_bytes() + method.generator.saved_bytes() + (16 << 20)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ValueError(
            f"output_dir {root} has {free >> 20} MiB free, but {kept} checkpoints and the trained model need "
            f"{needed >> 20} MiB; free some space or lower checkpoints_total_limit"
        )


def resume(root: Path, config: TrainConfig, accelerator: Accelerator, state: State, record: Record) -> None:
    """Take the state from the checkpoint that the user named, if any, and put later ones out of the way.

    Raises:
        FileNotFoundError: there is none. ValueError: it cannot be gone on from, or the folder holds a run already.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None and (checkpoints.exists(root) or (root / "model").exists()):
        raise ValueError(
            f"{root} already holds a run; continue it with --resume_from_checkpoint latest, "
            "or choose another --output_dir"
        )
    if wanted is not None and not (wanted == "auto" and not checkpoints.exists(root)):
        note: str | None = None

        def check(folder: Path, found: Checkpoint) -> None:
            nonlocal note
            note = check_same_run(folder, found.state, state, config)  # other options are not damage: they end it
            state.check_fits(folder, found)

        folder, found, damaged = checkpoints.find(root, wanted, check)
        for line in damaged:
            record.say(f"skipped a damaged checkpoint, which will be removed: {line}")
        if note:
            record.say(note)
        state.restore(folder, found)
        record.say(f"resumed from {folder}")
        accelerator.wait_for_everyone()  # all have read what is removed now
    if accelerator.is_main_process:
        checkpoints.clean(root)
        if wanted in checkpoints.NEWEST:
            checkpoints.remove_after(root, state.step)
        elif wanted is not None:
            for folder in checkpoints.set_aside_after(root, state.step):
                record.say(f"set aside, as this run goes on from an earlier step: {folder}")


def save_before_failing(root: Path, config: TrainConfig, accelerator: Accelerator, state: State, remedy: str) -> str:
    """Save the steps that were done before one that failed, which has changed nothing. Returns what to do, in words.

    Args:
        remedy: of StepFailed.
    """
    if not state.step:
        return "No step was done before it"
    folder = save_if_new(root, config, accelerator.is_main_process, state)
    accelerator.wait_for_everyone()  # a launcher ends the others when one has left
    return f"The steps before it are saved ({folder}): continue with {remedy}"


def save_if_new(root: Path, config: TrainConfig, main: bool, state: State) -> Path:
    """Save the state where this step is not saved yet; returns its checkpoint."""
    folder = root / f"checkpoint-{state.step:07d}"
    if main and not folder.exists():
        state.save(root, config.checkpoints_total_limit)
    return folder


@contextmanager
def look_failures(root: Path, config: TrainConfig, main: bool, state: State) -> Iterator[None]:
    """Inside, a score of held-out pictures that fails ends the run with its steps saved. The main process alone looks,
    so it does not wait for the others.
    """
    try:
        yield
    except ValueError as error:
        folder = save_if_new(root, config, main, state)
        raise StepFailed(
            f"after step {state.step}, on held-out pictures: {error}. All steps are saved ({folder}): continue with "
            f"{StepFailed.remedy}"
        ) from error


@contextmanager
def disk_failures(root: Path, state: State) -> Iterator[None]:
    """Inside, a file that cannot be written ends the run with what was lost: nothing up to the last checkpoint."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise cli.Failed(
            f"{reason} (at step {state.step}); {last_checkpoint(root)}. "
            "Mend that, then continue with --resume_from_checkpoint latest"
        ) from error


def last_checkpoint(root: Path) -> str:
    if not checkpoints.exists(root):
        return "there is no checkpoint yet"
    try:
        return f"the last checkpoint is {checkpoints.newest_valid(root)[0]}"
    except FileNotFoundError as error:
        return str(error)


class Stop:
    """Ctrl-C and SIGTERM end the run after the step under way, also one that came before and that an import swallowed;
    a second one ends it at once."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.signal = say, cli.asked

    def __enter__(self) -> Stop:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        if self.signal:
            STOPPING.set()
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)
        STOPPING.clear()

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise cli.Interrupted if number == signal.SIGINT else cli.Terminated
        self.signal = number
        STOPPING.set()
        self.say("stopping after this step; a checkpoint will be saved (again to stop at once)")

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all of them end after the same step."""
        if accelerator.num_processes == 1:
            return bool(self.signal)
        asked = torch.tensor(float(self.signal), device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum"))

    def leave(self) -> None:
        """Raise what ends the program."""
        raise cli.Terminated if self.signal == signal.SIGTERM else cli.Interrupted
