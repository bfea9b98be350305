"""`python -m tests.attack.planted`: plants faults in writers, readers and resume, and sees a test fail for each.

Each fault is one small change in a copy of the tree, in which the named test, which passes without it, must fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.io.cli import Parser, run

ROOT = Path(__file__).resolve().parents[2]
FILES, FOLDERS, SINK = "engine/io/files.py", "engine/io/folders.py", "engine/io/sink.py"
JOURNAL, MANIFEST, CHECKPOINT = "engine/io/journal.py", "engine/runtime/manifest.py", "gdpo/train/checkpoint.py"
IN_FILES, IN_CHECKPOINTS = "tests/engine/test_files.py", "tests/gdpo/test_checkpoint.py"
DAMAGE = f"{IN_CHECKPOINTS}::test_damage_under_right_hashes_is_skipped_with_a_line"


@dataclass(frozen=True)
class Fault:
    """`right` stands once in `file`; with `wrong` in its place, `test` (as pytest takes it) fails."""

    file: str
    right: str
    wrong: str
    test: str


FAULTS = [
    # writers
    Fault(FILES, "            fsync(staged)\n", "", f"{IN_FILES}::test_a_disk_that_fails_or_is_full_is_no_such_share"),
    Fault(
        FILES,
        "            staged.unlink()\n        os.close(handle)  # last",
        "            pass\n        os.close(handle)  # last",
        f"{IN_FILES}::test_what_is_being_written_is_locked_and_gone_when_it_fails",
    ),
    Fault(
        FILES,
        "            lock(handle)\n",
        "",
        f"{IN_FILES}::test_what_is_being_written_is_locked_and_gone_when_it_fails",
    ),
    Fault(
        FILES,
        " or status.st_mtime >= before:",
        ":",
        f"{IN_FILES}::test_leftovers_of_killed_runs_go_and_nothing_else_does",
    ),
    Fault(SINK, "if start < self._end:", "if False:", "tests/engine/test_sink.py::test_no_write_is_lost_in_silence"),
    Fault(
        SINK,
        "            left = left[written:]\n",
        "            break\n",
        "tests/engine/test_sink.py::test_a_full_disk_loses_no_picture_in_silence",
    ),
    Fault(
        SINK,
        "        if size != self._end:\n",
        "        if False:\n",
        "tests/engine/test_sink.py::test_writes_that_a_disk_swallows_are_seen_by_the_size",
    ),
    Fault(
        FOLDERS,
        "    if retired.exists() and not target.exists():\n",
        "    if False:\n",
        "tests/gdpo/test_storage.py::test_killed_at_a_rename_loses_nothing",
    ),
    Fault(
        FOLDERS,
        "                    os.replace(retired, target)\n                raise\n",
        "                    pass\n                raise\n",
        "tests/gdpo/test_storage.py::test_a_failing_rename_keeps_the_old_folder",
    ),
    Fault(
        CHECKPOINT,
        "                _remove(target)\n            os.replace(staged, target)",
        "                shutil.rmtree(target)\n            os.replace(staged, target)",
        f"{IN_CHECKPOINTS}::test_a_step_saved_again_is_whole_or_absent",
    ),
    Fault(
        CHECKPOINT, "_listed(root)[:-keep]", "_listed(root)[-keep:]", f"{IN_CHECKPOINTS}::test_round_trip_and_retention"
    ),
    # resume
    Fault(CHECKPOINT, " or sha256(path) != entry.sha256:", ":", f"{IN_CHECKPOINTS}::test_damage_is_found_and_named"),
    Fault(CHECKPOINT, "    if named and int(named[1]) != state.step:", "    if False:", DAMAGE),
    Fault(
        CHECKPOINT,
        "                if (file.metadata() or {})",
        "                if False and (file.metadata() or {})",
        DAMAGE,
    ),
    Fault(CHECKPOINT, ', "optimizer.safetensors")\n', ")\n", DAMAGE),
    Fault(CHECKPOINT, ", RecursionError)", ")", DAMAGE),
    Fault(
        CHECKPOINT,
        "            _remove(folder)\n\n\ndef set_aside",
        "            pass\n\n\ndef set_aside",
        f"{IN_CHECKPOINTS}::test_damaged_ones_do_not_count_among_those_kept",
    ),
    Fault(
        JOURNAL,
        "    if now.st_size != before.size or sha256(source) != before.sha256:",
        "    if now.st_size != before.size:",
        "tests/engine/test_journal.py::test_an_input_that_was_replaced_is_seen_even_with_the_old_size_and_time",
    ),
    Fault(
        JOURNAL,
        '                    line = b"\\n" + line\n',
        "                    pass\n",
        "tests/engine/test_journal.py::test_torn_and_foreign_lines_are_skipped_and_nothing_is_lost_after_them",
    ),
    # readers
    Fault(
        MANIFEST,
        "    if found != expected:\n",
        "    if False:\n",
        "tests/engine/test_manifest.py::test_no_mutant_reaches_a_backend",
    ),
    Fault(
        MANIFEST,
        '        depth += (character in b"[{") - (character in b"]}")\n',
        "",
        "tests/engine/test_manifest.py::test_a_manifest_that_is_wrong_is_refused_with_the_reason",
    ),
    Fault(
        MANIFEST,
        "type(value) is not int or not low <= value <= high",
        "type(value) is not int",
        "tests/engine/test_manifest.py::test_a_manifest_that_is_wrong_is_refused_with_the_reason",
    ),
]


def copied(target: Path) -> None:
    """The tree as it is, and the compiled core."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [*listed.split("\0")[:-1], *(str(p.relative_to(ROOT)) for p in (ROOT / "engine").glob("_core*"))]
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def tested(tree: Path, test: str) -> bool:
    """Whether a test passes.

    Raises:
        RuntimeError: it did not run.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-n0", "-x", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test} did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode == 0


def main() -> int:
    parser = Parser(prog="python -m tests.attack.planted", description="Plant faults, and see that tests fail.")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of faults, from 1 (default: all)")
    chosen = parser.parse_args().only or range(1, len(FAULTS) + 1)
    unseen = []
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work, "tree")
        copied(tree)
        for test in sorted({FAULTS[n - 1].test for n in chosen}):
            if not tested(tree, test):
                raise RuntimeError(f"{test} fails without a fault")
        for number in chosen:
            fault = FAULTS[number - 1]
            path, text = tree / fault.file, (tree / fault.file).read_text()
            if text.count(fault.right) != 1:
                raise RuntimeError(f"fault {number}: {fault.file} has {fault.right!r} {text.count(fault.right)} times")
            path.write_text(text.replace(fault.right, fault.wrong))
            seen = not tested(tree, fault.test)
            path.write_text(text)
            print(f"{number:2} {'seen' if seen else 'NOT SEEN'}: {fault.file}: {fault.right.strip()!r}", flush=True)
            if not seen:
                unseen.append(number)
    print(f"{len(list(chosen)) - len(unseen)} of {len(list(chosen))} faults are seen by a test")
    return 1 if unseen else 0


if __name__ == "__main__":
    run(main)
