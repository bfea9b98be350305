"""The run: keys in parts, each a Ray Data pipeline from keys through a pool of actors to the ledger."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.bulk.board import Board
from engine.bulk.claim import claimed
from engine.bulk.cluster import Machines, started
from engine.bulk.enlarger import Enlarger, Work
from engine.bulk.keys import Keys, batches, spool, spooled
from engine.bulk.ledger import CLAIM, LEDGER, NOTES, SUMMARY, Ledger
from engine.bulk.storage import Storage
from engine.io.cli import Failed
from engine.io.files import remove_leftovers
from engine.io.notices import say

PART = 50_000  # keys that the driver has in memory at a time, and that one file of the ledger holds;
PART_OF_A_WORKER = 500  # at least so many for each process, which starts anew with each part
BLOCK = 8  # keys that a process gets at a time, at most: whose rows a kill may lose
_SHARES = 4  # blocks for each process at least, where there are so many keys: the last ones end together
_LINE_SECONDS, _POLL_SECONDS = 30.0, 1.0


def run(
    work: Work,
    keys: Keys,
    machines: Machines,
    *,
    retry_failed: bool = False,
    part: int = PART,
    quiet: bool = False,
    enlarger: type = Enlarger,
) -> dict[str, Any]:
    """Make every picture that is not made yet.

    Args:
        work: what to make.
        keys: lists the keys of all pictures, given the output.
        machines: where.
        retry_failed: also those that failed in an earlier run.
        part: keys of one pipeline.
        quiet: no progress.
        enlarger: the class of the processes.

    Returns:
        The summary: keys, skipped, failed_before, done, failed, failures (the first thousand), seconds, per_second,
        ledger.

    Raises:
        ValueError: no pictures, the output belongs to another run, or was begun with other options.
        OSError: a storage failed before the work.
        Failed: the run cannot go on; what was finished stays finished.
    """
    out = Storage(work.out)
    ledger, begin = Ledger(out), time.monotonic()
    with claimed(out, CLAIM) as claim, tempfile.TemporaryDirectory(prefix="gdpo-bulk-") as scratch:
        ledger.check_recipe(work.recipe())
        ledger.gather()
        counts: dict[str, Any] = {"keys": 0, "skipped": 0, "failed_before": 0, "done": 0, "failed": 0, "failures": []}
        wanted = Path(scratch) / "keys"
        total = spool(_wanted(keys(out), ledger, counts, retry_failed, quiet), wanted)
        if not counts["keys"]:
            raise ValueError(f"{work.source}: no pictures there")
        ledger.keep_recipe(work.recipe())
        summary = dict(counts)
        if total:
            with started(machines) as (ray, workers):
                board = _board(ray)
                with _progress(ray, board, total, quiet):
                    for chunk in batches(spooled(wanted), max(part, PART_OF_A_WORKER * workers)):
                        claim.check()
                        listed, chunk = len(chunk), list(dict.fromkeys(chunk))
                        summary["skipped"] += listed - len(chunk)  # a list may name a picture twice
                        size = max(1, min(BLOCK, len(chunk) // (_SHARES * workers)))
                        pipeline = _pipeline(
                            ray, list(batches(iter(chunk), size)), enlarger, (work, board), machines, workers
                        )
                        _write(ray, pipeline, ledger, board, writers=1 + workers // 16)
                        out.remove(NOTES)
                        ray.get(board.clear.remote())
                for status, count in ray.get(board.counts.remote()).items():
                    summary[status] += count
                summary["failures"] += [{"key": k, "error": e} for k, e in sorted(ray.get(board.failures.remote()))]
                broken = ray.get(board.broken.remote())
            if out.local:
                for folder in sorted({Path(out.path(key)).parent for key in broken}):
                    remove_leftovers(folder, time.time())
        seconds = time.monotonic() - begin
        summary["seconds"] = round(seconds, 2)
        summary["per_second"] = round((summary["done"] + summary["failed"]) / seconds, 3)
        summary["ledger"] = f"{out.url}/{LEDGER}"
        out.write(SUMMARY, json.dumps(summary, indent=1).encode())
        return summary


def _wanted(
    keys: Iterator[str], ledger: Ledger, counts: dict[str, Any], retry_failed: bool, quiet: bool
) -> Iterator[str]:
    """Those keys that are to be made; counts all of them."""
    settled, said = ledger.settled(), time.monotonic()
    for some in batches(keys, 10_000):
        counts["keys"] += len(some)
        named = [key for key in some if _is_text(key)]
        for key in set(some) - set(named):  # neither a ledger nor most storage can hold it
            counts["failed"] += 1
            counts["failures"].append({"key": repr(key), "error": "its name is not text in UTF-8; rename it"})
        for key, state in zip(named, settled.of(named)):
            if state == "done":
                counts["skipped"] += 1
            elif state == "failed" and not retry_failed:
                counts["failed_before"] += 1
            else:
                yield key
        if time.monotonic() - said > _LINE_SECONDS and not quiet:
            said = time.monotonic()
            say(f"listing: {counts['keys']} pictures so far")


def _board(ray: Any) -> Any:
    """The board, on the machine of this process: one that is lost takes no notes with it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


def _is_text(key: str) -> bool:
    try:
        key.encode()
        return True
    except UnicodeEncodeError:
        return False


def _pipeline(
    ray: Any, blocks: list[list[str]], enlarger: type, arguments: tuple[Any, ...], machines: Machines, workers: int
) -> Any:
    """From keys to rows of the ledger, a block at a time."""
    import pyarrow as pa

    tables = [pa.table({"key": pa.array(keys, pa.string())}) for keys in blocks]
    return ray.data.from_arrow(tables).map_batches(
        enlarger,
        batch_format="pyarrow",
        batch_size=None,  # whole blocks
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
        ),
        fn_constructor_args=arguments,
        num_cpus=machines.cpus,
        num_gpus=machines.gpus or None,
    )


def _write(ray: Any, pipeline: Any, ledger: Ledger, board: Any, writers: int) -> None:
    """Make the pictures of a part and write their rows, with so many tasks at a time."""
    import pyarrow.fs

    out, folder = ledger.out, ledger.new_part()
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(out.fs))
    out.make_folder(f"{folder}/rows")
    try:
        pipeline.write_parquet(
            out.path(folder), filesystem=filesystem, ray_remote_args={"num_cpus": 0.5}, concurrency=writers
        )
    except Exception as error:
        reason = ""
        with contextlib.suppress(Exception):
            reason = ray.get(board.reason.remote(), timeout=10)
        if not reason:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[-1].strip()}"
        raise Failed(f"{reason}; the run stopped, what is finished is kept: the same command goes on") from error
    ledger.gather()


@contextmanager
def _progress(ray: Any, board: Any, total: int, quiet: bool) -> Iterator[None]:
    """A bar on a terminal, else a line now and then, with the time left."""
    from tqdm import tqdm

    if quiet:
        yield
        return
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=total, unit="picture", file=sys.stderr, disable=not on_terminal)
    stop, begin = threading.Event(), time.monotonic()

    def watch() -> None:
        said = begin
        while not stop.wait(_POLL_SECONDS):
            try:
                counts = ray.get(board.counts.remote(), timeout=10)
            except Exception:
                continue  # Ray ends, or is busy
            made, now = sum(counts.values()), time.monotonic()
            bar.update(made - bar.n)
            if not on_terminal and made and now - said >= _LINE_SECONDS:
                said = now
                left = tqdm.format_interval((now - begin) * (total - made) / made)
                say(f"{made} of {total} pictures, {counts.get('failed', 0)} failed, about {left} left")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(15)
        bar.close()
