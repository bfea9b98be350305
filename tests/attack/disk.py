"""A disk that is full at every write of every writer, and file systems that are slow or lie.

Each writer is a command that runs in a process of its own, with tests/support/faulty_disk.c below it. It may succeed,
with the bytes that it always writes, or end in a line; it leaves no half file, spoils no older one, and run again with
the disk mended it gives those bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from engine.io import cli
from engine.io.images import SUFFIXES
from tests.attack.harness import Quiet, Section, Trial, emptied
from tests.support import faulty
from tests.support.folders import model, write_folder
from tests.support.pictures import installed

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "GDPO_FAULTY"  # environment: the library that this process was started with
FAILING = "failing"  # the folder below OUT whose disk fails
CHANGES = {".gdpo-upscale.jsonl", "environment.json", "metrics.jsonl", "finished"}  # with times in them


def writers(work: Path) -> dict[str, tuple[str, list[str]]]:
    """Name -> (module, arguments); `{out}` is an empty folder."""
    pictures, folder, photos = work / "in", work / "folder", work / "photos"
    for i in range(3):
        grain = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        for place, size in ((pictures, (24, 20)), (photos, (96, 80))):
            place.mkdir(exist_ok=True)
            Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(place / f"{i}.png")
    deep = np.random.default_rng(9).integers(0, 65536, (20, 24), dtype=np.uint16)
    Image.fromarray(deep).save(work / "deep.png")
    write_folder(folder, model())
    upscale = ["--model", str(folder), "--no-progress", "--threads", "1"]
    found = {
        f"upscale to {suffix}": ("engine.upscale", [f"{pictures}/0.png", f"{{out}}/a{suffix}", *upscale])
        for suffix, kind in sorted(SUFFIXES.items())
        if installed(kind) and suffix not in (".jpeg", ".jpe", ".tiff", ".heif", ".dib")
    }
    for suffix in (".png", ".tif"):
        found[f"upscale 16 bit to {suffix}"] = ("engine.upscale", [f"{work}/deep.png", f"{{out}}/a{suffix}", *upscale])
    found["upscale a folder"] = ("engine.upscale", [str(pictures), "{out}/made", *upscale])
    found["upscale with a page"] = (
        "engine.upscale",
        [f"{pictures}/0.png", "{out}/a.png", *upscale, "--compare", "{out}/page.html"],
    )
    bundled = str(ROOT / "engine" / "data" / "tiny")
    found["engine.build"] = ("engine.build.__main__", [str(folder), "--out", "{out}/built", "--backend", "onnxruntime"])
    found["gdpo.convert"] = ("gdpo.convert", [bundled, "--out", "{out}/model"])
    found["gdpo.prepare"] = ("gdpo.prepare", [str(photos), "--out", "{out}/crops", "--size", "64", "--stride", "32",
                                              "--halve", "false", "--no-progress"])  # fmt: skip
    train = ["naosd", "--model.full=true", "--vsd_weight=0", "--perceptual_weight=0", "--data.crop_size=64",
             "--model.block_out_channels=[8]", "--model.layers_per_block=1", "--max_train_steps=2",
             "--checkpointing_steps=1", "--validation_images=1", f"--data.folder={photos}",
             "--output_dir={out}/run", "--resume_from_checkpoint=auto"]  # fmt: skip
    found["gdpo.train"] = ("gdpo.train.__main__", train)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those with times in them; the folder's own path, which a run's config names, is
    left out."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in CHANGES)
    return {str(p.relative_to(folder)): p.read_bytes().replace(str(folder).encode(), b"") for p in files}


class Disk:
    """Runs writers in this process's children, with or without a fault."""

    def __init__(self, work: Path):
        self.root, self.notes = emptied(work.parent / FAILING), emptied(work / "notes")
        self.writers = writers(emptied(work / "inputs"))
        self.library = ctypes.CDLL(os.environ[LIBRARY])
        self.reference: dict[str, tuple[int, dict[str, bytes]]] = {}

    def run(self, name: str, out: Path, kind: str, at: int, *, again: bool = False) -> tuple[int, str, int]:
        """(exit code, stderr, operations) of a writer; `again`: it may replace what is there."""
        module, arguments = self.writers[name]
        counted = self.notes / "count"
        child = os.fork()
        if child == 0:
            code = 70
            with contextlib.suppress(BaseException):
                signal.alarm(300)
                more = ["--overwrite"] if again and module in ("engine.upscale", "gdpo.convert") else []
                sys.argv = [module, *(a.replace("{out}", str(out)) for a in arguments), *more]
                main = import_module(module).main
                with Quiet(self.notes):
                    self.library.faulty_arm(kind.encode(), ctypes.c_long(at))
                    try:
                        cli.run(main)
                    except SystemExit as end:
                        code = end.code if isinstance(end.code, int) else 71
                    finally:
                        operations = self.library.faulty_count()
                        self.library.faulty_arm(b"none", ctypes.c_long(0))
                counted.write_text(str(operations))
            os._exit(code)
        counted.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, Quiet(self.notes).text(), int(counted.read_text()) if counted.is_file() else 0

    def expected(self, name: str) -> tuple[int, dict[str, bytes]]:
        """(operations, files) without a fault."""
        if name not in self.reference:
            import_module(self.writers[name][0])  # once for all its runs
            out = emptied(self.root / "reference")
            code, err, operations = self.run(name, out, "none", 0)
            assert code == 0, f"{name} without a fault: exit {code}: {err[-300:]}"
            self.reference[name] = operations, contents(out)
        return self.reference[name]

    def fail(self, name: str, kind: str, at: int, *, may_fail: bool) -> None:
        """Run a writer over a disk that fails, judge what it left, and run it again over a good one."""
        _, wanted = self.expected(name)
        out, case = emptied(self.root / "out"), f"{name}, {kind} at {at}"
        code, err, _ = self.run(name, out, kind, at)
        case += f": exit {code}, {err[-200:]!r}"
        assert code in ((0, 1, 2) if may_fail else (0,)), case
        assert "Traceback" not in err and "Exception ignored" not in err, case
        left = [str(p.relative_to(out)) for p in out.rglob("*") if p.name.endswith((".staged", ".retired"))
                or ".partial" in p.name or p.name.startswith(".staged-")]  # fmt: skip
        # What cannot be removed on a broken disk is removed by the next run.
        made = {k: v for k, v in contents(out).items() if not any(k.startswith(p) for p in left)}
        torn = [
            k
            for k, v in made.items()
            if k in wanted and v != wanted[k] and not k.endswith((".json", ".jsonl", ".html"))
        ]
        assert not torn, f"{case}; torn: {torn}"
        assert code or made == wanted, f"{case}; success, but without {sorted(wanted.keys() - made.keys())}"
        assert not code or str(out) in err, f"{case}: it does not name the file"
        again, err, _ = self.run(name, out, "none", 0, again=True)
        assert again == 0, f"{case}; and again, on a good disk: exit {again}, {err[-300:]}"
        differ = sorted(k for k in wanted | contents(out) if wanted.get(k) != contents(out).get(k))
        assert not differ, f"{case}; and again, on a good disk: other files {differ[:4]}"


FULL = ("full", "short", "io", "lost")
STRANGE = ("slow", "tiny", "eintr", "nosync", "bad")


TOGETHER = 12  # trials of one writer that share its run without a fault


def full(work: Path) -> Trial:
    disk = Disk(work)
    names = list(disk.writers)

    def trial(number: int) -> None:
        block, place = divmod(number, TOGETHER)
        name, kind = names[block % len(names)], FULL[place % len(FULL)]
        turn = block // len(names) * (TOGETHER // len(FULL)) + place // len(FULL)
        if kind == "lost" and not name.startswith("upscale"):  # a disk that lies is seen by the size of pictures alone
            kind = "full"
        operations, _ = disk.expected(name)
        assert operations, f"{name} wrote nothing that is watched"
        # Every write in turn, where there are few, else some of them.
        at = turn + 1 if turn < operations else random.Random(number).randint(1, operations)
        disk.fail(name, kind, at, may_fail=True)

    return trial


def strange(work: Path) -> Trial:
    disk = Disk(work)
    names = list(disk.writers)

    def trial(number: int) -> None:
        name, kind = names[number // len(STRANGE) % len(names)], STRANGE[number % len(STRANGE)]
        disk.fail(name, kind, random.Random(number).randint(1, 20), may_fail=kind == "bad")

    return trial


def start_over_with_library(out: Path) -> None:
    """Start this program again with the library loaded, unless it is."""
    if LIBRARY in os.environ or faulty.missing():
        return
    out.mkdir(parents=True, exist_ok=True)
    library = faulty.build(out)
    more = faulty.environment(library, out / FAILING) | {LIBRARY: str(library)}
    arguments = [sys.executable, "-m", "tests.attack", *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **more})


def sections() -> list[Section]:
    """Where the library cannot be built there are none."""
    if LIBRARY not in os.environ:
        return []
    return [
        Section("disk", "disks full or failing at a write", 1200, full, chunk=TOGETHER, seconds=120),
        Section("disk-strange", "disks that are slow, lie, or fail to read", 110, strange, chunk=5, seconds=120),
    ]
