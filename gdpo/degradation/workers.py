"""Threads that each do whole samples: small images are not worth splitting one operation over the cores."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def map_samples(work: Callable[[int], T], count: int) -> list[T]:
    """[work(0), ..., work(count - 1)], on as many threads as torch uses; in each, torch's operations use one."""
    threads = torch.get_num_threads()
    if threads == 1 or count == 1:
        return [work(i) for i in range(count)]
    return list(_pool(os.getpid(), threads).map(work, range(count)))


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process (a forked child has none of its parent's)."""
    ready = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of threads yet to begin
        ready.wait()

    pool = ThreadPoolExecutor(threads, "degradation", initializer=begin)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # for threads that others begin later
    return pool
