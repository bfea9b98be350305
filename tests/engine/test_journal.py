"""The journal: what is finished, what is stale, and what is not ours."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.io import journal as journals
from engine.io import notices
from engine.io.files import sha256 as files_sha256
from engine.io.journal import NAME, FileState, Journal

RECIPE = {"seed": 0, "color": "wavelet", "quality": None}


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """An input, and its output as recorded."""
    source, target = tmp_path / "in" / "a.png", tmp_path / "out" / "a.png"
    for path, content in ((source, b"input"), (target, b"output")):
        path.parent.mkdir()
        path.write_bytes(content)
    record(target, source)
    return source, target


def record(target: Path, source: Path, recipe=RECIPE) -> None:
    Journal(target.parent).record(target, target, source, FileState.of(source), recipe)


def look(target: Path, source: Path, recipe=RECIPE, **more):
    return Journal(target.parent).look(target, source, recipe, **more)


def test_finished_is_what_was_made_from_this_input_with_these_options(files, tmp_path):
    source, target = files
    assert look(target, source).kind == "finished"
    assert look(tmp_path / "out" / "b.png", source).kind == "absent"
    found = look(target, source, {**RECIPE, "seed": 9, "wrap": "both"})
    assert (found.kind, found.reason) == ("stale", "other options: seed 0 -> 9, wrap none -> both")


def test_an_option_that_came_later_changes_nothing_where_it_is_not_used(files):
    source, target = files
    assert look(target, source, {**RECIPE, "new": None}).kind == "finished"
    assert look(target, source, {**RECIPE, "new": 1}).kind == "stale"


def test_an_input_that_was_replaced_is_seen_even_with_the_old_size_and_time(files):
    source, target = files
    before = source.stat()
    source.write_bytes(b"INPUT")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_mtime_ns == before.st_mtime_ns
    found = look(target, source)
    assert (found.kind, found.reason) == ("stale", "the input has changed")


def test_an_input_with_the_same_bytes_is_the_same_and_is_hashed_once(files, monkeypatch):
    source, target = files
    moved = source.with_name("moved.png")
    source.rename(moved)
    os.utime(moved, (1, 1))
    hashed = []
    monkeypatch.setattr(journals, "sha256", lambda path: hashed.append(path) or files_sha256(path))
    assert [look(target, moved).kind for _ in range(3)] == ["finished"] * 3
    assert hashed == [moved]


def test_what_is_not_known_to_be_ours_is_foreign(files, tmp_path):
    source, target = files
    target.write_bytes(b"edited")
    assert look(target, source).reason == "has changed since it was made"
    stranger = target.with_name("stranger.png")
    stranger.write_bytes(b"x")
    assert look(stranger, source).reason == "was not made by this command"
    other = tmp_path / "other" / "a.png"  # another folder's picture of the same name: its result would be lost
    other.parent.mkdir()
    other.write_bytes(b"another")
    target.write_bytes(b"output")
    found = look(target, other)
    assert found.kind == "foreign" and found.reason == f"was made from another picture, {Path('../in/a.png')}"
    assert look(target, other, origin="standard input").kind == "foreign"


def test_a_copied_output_is_recognised_by_its_bytes(files):
    source, target = files
    content = target.read_bytes()
    target.unlink()
    target.write_bytes(content)
    os.utime(target, (5, 5))
    assert look(target, source).kind == "finished"


def test_a_run_that_was_killed_before_the_rename_leaves_an_output_that_is_known(files):
    source, target = files
    beside = target.with_name("staged")
    beside.write_bytes(b"other output")
    Journal(target.parent).record(beside, target, source, FileState.of(source), {**RECIPE, "seed": 9})
    assert look(target, source).kind == "finished"  # what is there was made with the first options
    assert look(target, source, {**RECIPE, "seed": 9}).kind == "stale"
    os.replace(beside, target)
    assert look(target, source, {**RECIPE, "seed": 9}).kind == "finished"
    assert look(target, source).kind == "stale"


@pytest.mark.parametrize(
    "torn", [b'{"version": 1, "outp', b"\xff\xfe\n", b"[" * 100_000, b"null\n", b'{"version": 1}\n', b'{"version":2}\n']
)
def test_torn_and_foreign_lines_are_skipped_and_nothing_is_lost_after_them(files, torn):
    source, target = files
    path = target.parent / NAME
    path.write_bytes(path.read_bytes() + torn)
    assert look(target, source).kind == "finished"
    second = target.with_name("b.png")
    second.write_bytes(b"second")
    record(second, source)
    assert look(target, source).kind == look(second, source).kind == "finished"


@pytest.mark.parametrize("key, value", [("made", 3), ("recipe", []), ("output", None), ("origin", {}), ("source", {})])
def test_a_line_of_wrong_types_says_nothing(files, key, value):
    source, target = files
    path = target.parent / NAME
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, key: value}) + "\n")
    assert look(target, source).kind == "foreign"


def test_names_that_are_not_utf8_are_recorded(tmp_path):
    source = target = tmp_path / os.fsdecode(b"\xff\xfe.png")
    source.write_bytes(b"x")
    record(target, source)
    assert look(target, source).kind == "finished"


def test_a_journal_that_cannot_be_written_costs_a_warning_and_no_picture(files, capsys, monkeypatch):
    source, target = files
    monkeypatch.setattr(notices, "_said", set())
    path = target.parent / NAME
    path.unlink()
    path.symlink_to("/etc/passwd")  # nobody writes elsewhere through our name
    record(target, source)
    record(target, source)
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and "will not know what is finished here" in err


WRITER = """
import sys
from pathlib import Path
from engine.io.journal import FileState, Journal
folder, start = Path(sys.argv[1]), int(sys.argv[2])
source = folder / "source"
state = FileState.of(source)
for i in range(start, start + 50):
    made = folder / f"{i}.png"
    made.write_bytes(str(i).encode())
    Journal(folder).record(made, made, source, state, {"seed": i})
"""


def test_runs_that_share_a_folder_lose_no_line(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(50 * k)]) for k in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    journal = Journal(tmp_path)
    assert {journal.look(tmp_path / f"{i}.png", source, {"seed": i}).kind for i in range(150)} == {"finished"}


def test_a_thousand_finished_pictures_are_told_in_moments(tmp_path):
    """Once a whole journal was read for each picture."""
    source = tmp_path / "source"
    source.write_bytes(b"x")
    state, lines = FileState.of(source), []
    targets = [tmp_path / f"{i}.png" for i in range(1000)]
    for target in targets:
        target.write_bytes(b"y")
        line = journals.Record(target.name, FileState.of(target), "source", state, RECIPE)
        lines.append(json.dumps({"version": 1, **asdict(line)}) + "\n")
    (tmp_path / NAME).write_text("".join(lines))
    journal, begin = Journal(tmp_path), time.process_time()
    assert all(journal.look(target, source, RECIPE).kind == "finished" for target in targets)
    assert time.process_time() - begin < 2  # 0.1 s; quadratic reading takes more than ten


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"not a regular file: .*pipe\.png"):
        FileState.of(tmp_path / "pipe.png")
