"""One optimiser step: micro-batches, gradients averaged over processes, clip, update.

Gradients are averaged by one flat all-reduce instead of DistributedDataParallel: a step runs the same weights several
times (policy, reference, sampler; generator, teacher, fake) with adapters switched between, which DDP's hooks do not
follow, and what is trained is small.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from engine.io.images import ImageError
from gdpo.model.parts import first_line
from gdpo.photos.dataset import Batch
from gdpo.train.config import TrainConfig
from gdpo.train.methods.base import Method, Metrics
from gdpo.train.state import State, rate


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; training stopped and nothing was overwritten."""


class StepFailed(RuntimeError):
    """A step could not be done, here or in another process; nothing was updated. `remedy`: how to resume, in words."""

    remedy = "--resume_from_checkpoint latest when it is mended"


class PictureFailed(StepFailed):
    """A picture could not be read."""

    remedy = (
        "--resume_from_checkpoint latest and --data.on_error skip, or mend the picture or take it away and add "
        "--allow_data_change true"
    )


def optimizer_step(
    config: TrainConfig, accelerator: Accelerator, method: Method, state: State, batches: Iterator[Batch]
) -> dict[str, float]:
    """Do one step, and return figures for the log, averaged over micro-batches and processes.

    Raises:
        NonFiniteLoss: the loss or a gradient is not finite.
        StepFailed: a picture, a score or the GPU's memory, named; the parameters are as before. In every process.
    """
    for group, (peak, _) in zip(state.optimizer.param_groups, method.groups.values()):
        group["lr"] = peak * rate(config, state.step)
    total, names = _micro_batches(config, accelerator, method, state, batches)
    total = _averaged(total, accelerator)
    values = dict(zip(total, torch.stack(list(total.values())).tolist()))
    _require_finite("loss", values["loss"], state, names, accelerator)

    _average_gradients(state.parameters, accelerator)
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer.optimizer)
    main_group = next(iter(method.groups))
    for name, (_, parameters) in method.groups.items():
        norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf))
        values["grad_norm" if name == main_group else f"grad_norm/{name}"] = norm
        if state.scaler is None:
            _require_finite("gradient norm", norm, state, names, accelerator)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.update_average(config.ema_decay)
    values["learning_rate"] = state.optimizer.param_groups[0]["lr"]
    return values


def _micro_batches(
    config: TrainConfig, accelerator: Accelerator, method: Method, state: State, batches: Iterator[Batch]
) -> tuple[Metrics, list[str]]:
    """Gradients of this process's micro-batches: the mean of their metrics, the names of their pictures."""
    count = config.gradient_accumulation_steps
    total: Metrics = {}
    names: list[str] = []
    current: list[str] = []
    failure: Exception | None = None
    try:
        for _ in range(count):
            batch = next(batches)
            current = batch.names
            names += current
            for line in batch.skipped:
                tqdm.write(f"skipped, and another picture taken in its place: {line}", file=sys.stderr)
            if config.data.on_error == "skip":  # a mean over micro-batches and processes, as all figures are
                share = torch.tensor(float(len(batch.skipped) * accelerator.num_processes), device=accelerator.device)
                total["skipped"] = total.get("skipped", 0) + share
            batch = batch._replace(hr=batch.hr.to(accelerator.device, non_blocking=True))
            metrics = method.step(batch, state.step, lambda loss: accelerator.backward(loss / count))
            for key, value in metrics.items():
                total[key] = total.get(key, 0.0) + value.detach().float().mean() / count
    except Exception as error:
        failure = error
    if accelerator.num_processes > 1:  # the others must not wait for this one's part
        failed = torch.tensor(float(failure is not None), device=accelerator.device)
        if float(accelerator.reduce(failed, "sum")) and failure is None:
            raise StepFailed(f"at step {state.step + 1}, another process failed; its line says why")
    at = f"at step {state.step + 1}"
    if isinstance(failure, ImageError):
        raise PictureFailed(f"{at}: {failure}") from failure
    if isinstance(failure, torch.cuda.OutOfMemoryError):
        raise StepFailed(f"{at}, {_smaller(config)}: {failure}") from failure
    if failure is not None:
        what = str(failure) if isinstance(failure, ValueError) else f"{type(failure).__name__}: {first_line(failure)}"
        raise StepFailed(f"{at}, samples {', '.join(current)}: {what}") from failure
    return total, names


def _average_gradients(parameters: dict[str, nn.Parameter], accelerator: Accelerator) -> None:
    """Over processes, in one flat fp32 all-reduce."""
    for p in parameters.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    whole = accelerator.reduce(torch.cat([g.float().reshape(-1) for g in grads]), "mean")
    for g, part in zip(grads, whole.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def _averaged(metrics: Metrics, accelerator: Accelerator) -> Metrics:
    if accelerator.num_processes == 1:
        return metrics
    return dict(zip(metrics, accelerator.reduce(torch.stack(list(metrics.values())), "mean")))


def _require_finite(what: str, value: float, state: State, names: list[str], accelerator: Accelerator) -> None:
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the {what} is {value} at step {state.step + 1}; samples of process {accelerator.process_index}: "
            f"{', '.join(names)}. Try a lower learning_rate, mixed_precision no, or look at these samples"
        )


def _smaller(config: TrainConfig) -> str:
    """What of this configuration would need less memory."""
    remedies = [] if config.model.gradient_checkpointing else ["--model.gradient_checkpointing true"]
    if config.train_batch_size > 1:
        remedies.append("a smaller --train_batch_size")
    if getattr(config, "sample_batch_size", 0) > 1:
        remedies.append("a smaller --sample_batch_size")
    if config.data.crop_size > 64:
        remedies.append("a smaller --data.crop_size")
    return f"{' or '.join(remedies) or 'a smaller model'} needs less memory"
