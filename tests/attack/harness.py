"""Runs numbered trials in forked processes: a crash, a hang or a leak ends a trial, not the attack.

What was tried is kept in OUT/trials.jsonl, a line for each chunk of trials, so that an attack goes on where it stopped.
A trial is a pure function of its number.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Trial = Callable[[int], None]
PATIENCE = (30, 10)  # seconds, and times a trial's: a busy machine gives a share of its time


@dataclass
class Section:
    """A kind of attack.

    Attributes:
        about: what is tried, in words, for the table.
        tries: how many trials make it whole; more start again with other random numbers where that makes sense.
        start: given a folder of its own, prepares and returns the trial, which raises where the product failed.
        chunk: trials in one process.
        inside: whether each process starts for itself, as what `start` loads does not survive a fork.
        seconds, mib: what a trial may take, of the processor's time and of memory beyond what was there before.
    """

    name: str
    about: str
    tries: int
    start: Callable[[Path], Trial]
    chunk: int = 1
    inside: bool = False
    seconds: float = 60
    mib: float = 2000


@dataclass
class Result:
    """Of one section."""

    commit: str
    tries: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    mib: float = 0.0

    def add(self, row: dict[str, Any]) -> None:
        self.tries += row["tries"]
        self.failures += row["failures"]
        self.seconds, self.mib = max(self.seconds, row["seconds"]), max(self.mib, row["mib"])


class Log:
    """The chunks that were tried, at this commit and at others."""

    def __init__(self, out: Path, commit: str):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.commit = out / "trials.jsonl", commit

    def result(self, section: str) -> Result:
        """Of a section at this commit."""
        return self._of(section, self.commit)

    def latest(self, section: str, tries: int) -> Result:
        """Of a section at the last commit with so many tries, else at this one: it is tried again after a mend."""
        commits = dict.fromkeys(row["commit"] for row in reversed([*self._rows(section)]))
        whole = (found for commit in commits if (found := self._of(section, commit)).tries >= tries)
        return next(whole, self.result(section))

    def _of(self, section: str, commit: str) -> Result:
        result = Result(commit)
        for row in self._rows(section):
            if row["commit"] == commit:
                result.add(row)
        return result

    def _rows(self, section: str) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError):  # cut by a kill
                row = json.loads(line)
                if row["section"] == section:
                    yield row

    def append(self, section: str, row: dict[str, Any]) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps({"section": section, "commit": self.commit, **row}) + "\n")


def run_chunk(section: Section, trial: Trial | Path, first: int, count: int) -> dict[str, Any]:
    """Trials first..first+count-1. One that kills its process or hangs is a failure, and the next ones still run.

    Args:
        trial: or the folder in which each process starts for itself.
    """
    row: dict[str, Any] = {"tries": 0, "failures": [], "seconds": 0.0, "mib": 0.0}
    number = first
    while number < first + count:
        for report in _forked(section, trial, number, first + count - number):
            if report["error"]:
                row["failures"].append(f"{section.name} {number}: {report['error']}")
            row["seconds"] = max(row["seconds"], round(report["seconds"], 3))
            row["mib"] = max(row["mib"], round(report["mib"], 1))
            row["tries"] += 1
            number += 1
    return row


def _forked(section: Section, trial: Trial | Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield a report of each trial until the process is through, or dies."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)
        with contextlib.suppress(BaseException):
            _serve(section, trial, range(first, first + count), write)
        os._exit(0)
    os.close(write)
    done, buffered, limit = 0, b"", PATIENCE[0] + PATIENCE[1] * section.seconds
    try:
        while done < count:
            ready, _, _ = select.select([read], [], [], limit)
            received = os.read(read, 1 << 16) if ready else b""
            if not received:
                break
            *lines, buffered = (buffered + received).split(b"\n")
            for line in lines:
                done += 1
                yield json.loads(line)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read)
    if done < count:
        ended = f"ended by signal {-code}" if (code := os.waitstatus_to_exitcode(status)) < 0 else f"exit {code}"
        hung = bool(not ready)
        error = f"no answer in {limit:.0f} s" if hung else f"the process was {ended}"
        yield {"seconds": limit if hung else 0.0, "mib": 0.0, "error": error}


def _serve(section: Section, trial: Trial | Path, numbers: range, pipe: int) -> None:
    if isinstance(trial, Path):
        trial = section.start(trial)
    for number in numbers:
        before, began, error = _fresh_peak(), _processor_time(), ""
        try:
            trial(number)
        except Exception as caught:
            where = traceback.extract_tb(caught.__traceback__)[-1]
            error = f"{type(caught).__name__} at {Path(where.filename).name}:{where.lineno}: {str(caught)[:600]}"
        seconds = _processor_time() - began
        mib = max(_status("VmHWM") - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        if not error and seconds > section.seconds:
            error = f"took {seconds:.1f} s"
        if not error and mib > section.mib:
            error = f"took {mib:.0f} MiB"
        os.write(pipe, json.dumps({"seconds": seconds, "mib": mib, "error": error}).encode() + b"\n")


def _processor_time() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _fresh_peak() -> float:
    """Forget this process's peak of memory; returns what it holds now, in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


class Quiet:
    """Inside, this process's standard streams are files; `text()` is what was written to stderr."""

    def __init__(self, folder: Path):
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"

    def __enter__(self) -> Quiet:
        sys.stdout.flush()
        sys.stderr.flush()
        self.saved = [os.dup(1), os.dup(2)]
        for number, path in ((1, self.out), (2, self.err)):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for number, handle in zip((1, 2), self.saved):
            os.dup2(handle, number)
            os.close(handle)

    def text(self) -> str:
        return self.err.read_text(errors="replace")


def emptied(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def attack(sections: list[Section], log: Log, out: Path, deadline: float, tries: int | None) -> dict[str, Result]:
    """Run chunks, of the section that is furthest behind, until all are done or the time is over.

    Args:
        tries: of each section, instead of its own number.
    """
    running: dict[str, Trial | Path] = {}
    began, results = time.monotonic(), {s.name: log.result(s.name) for s in sections}
    at_start = sum(r.tries for r in results.values())
    wanted = {s.name: min(tries or s.tries, s.tries) for s in sections}
    while time.monotonic() < deadline:
        left = [s for s in sections if results[s.name].tries < wanted[s.name]]
        if not left:
            break
        section = min(left, key=lambda s: results[s.name].tries / wanted[s.name])
        if section.name not in running:
            work = emptied(out / section.name)
            running[section.name] = work if section.inside else section.start(work)
        first = results[section.name].tries
        count = min(section.chunk, wanted[section.name] - first)
        row = run_chunk(section, running[section.name], first, count)
        log.append(section.name, row)
        results[section.name].add(row)
        for failure in row["failures"]:
            print(f"FAILED {failure}", file=sys.stderr)
        done = sum(min(results[s.name].tries, wanted[s.name]) for s in sections)
        share = sum(min(1, results[s.name].tries / wanted[s.name]) for s in sections) / len(sections)
        spent = time.monotonic() - began
        print(
            f"{done} of {sum(wanted.values())} trials ({100 * share:.0f}%), {section.name}; {spent / 60:.1f} min, "
            f"at most {max(0.0, deadline - time.monotonic()) / 60:.1f} more; {done - at_start} in this run",
            file=sys.stderr,
        )
    return results
