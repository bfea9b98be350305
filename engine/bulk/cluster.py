"""Ray for one run: started on this machine, or a cluster that is there."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.io.cli import Failed

_SPARE = 4  # logical CPUs besides those of the actors, for Ray Data's own tasks; without them it waits for ever
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will change
    "RAY_agent_register_timeout_ms": "300000",  # a busy machine takes longer than the 30 s that are allowed
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_prestart_worker_first_driver": "0",  # processes that nobody needs
    "RAY_worker_niceness": "0",  # Ray would run its processes at 15, which is last on a machine that is shared
}


@dataclass(frozen=True)
class Machines:
    """Where a run takes place.

    Attributes:
        address: of a Ray cluster ("auto": the one of this machine); None starts Ray here for this run.
        workers: processes that make pictures; 0: one for each CPU (or GPU share) that is left.
        cpus: of each process.
        gpus: of each process; less than 1 shares a GPU.
    """

    address: str | None = None
    workers: int = 0
    cpus: float = 1
    gpus: float = 0


@contextmanager
def started(machines: Machines) -> Iterator[tuple[Any, int]]:
    """Ray, and how many processes make pictures.

    Raises:
        ValueError: no cluster at the address, or it lacks what a process needs.
        Failed: Ray did not start on this machine.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    _connect(ray, machines)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the command in the middle
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # one picture may take longer than half an hour
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield ray, _workers(ray.cluster_resources(), machines)
    finally:
        ray.shutdown()


def _connect(ray: Any, machines: Machines) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if machines.address is not None:
        try:
            _knock(machines.address)
            ray.init(machines.address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--address {machines.address}: no Ray cluster there ({_line(error)})") from None
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = machines.workers or max(1, int(cores // machines.cpus))
    try:
        ray.init(
            "local",
            num_cpus=max(6, int(workers * machines.cpus) + _SPARE),
            object_store_memory=256 << 20,  # keys and rows only
            include_dashboard=False,
            **quiet,
        )
    except Exception as error:  # Ray raises plain Exception where its processes do not start in time
        raise Failed(f"Ray did not start on this machine ({_line(error)})") from error


def _knock(address: str) -> None:
    """Find out in seconds whether anybody is there; Ray takes a minute and prints lines of its own."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()


def _workers(have: dict[str, float], machines: Machines) -> int:
    cpus, gpus = have.get("CPU", 0) - _SPARE, have.get("GPU", 0)
    if machines.gpus > gpus:
        raise ValueError(f"--gpus-per-worker {machines.gpus:g}: Ray sees {gpus:g} GPUs")
    if machines.cpus > cpus:
        raise ValueError(
            f"--threads {machines.cpus:g}: Ray sees {have.get('CPU', 0):g} CPUs, {_SPARE} of which are its own"
        )
    room = min(cpus // machines.cpus, gpus // machines.gpus if machines.gpus else cpus)
    return machines.workers or max(1, int(room))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
