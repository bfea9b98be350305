"""Files that are whole or absent, on file systems that refuse this and that, and what killed runs leave."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.build.onnxruntime import optimise
from engine.io import cli, files, notices
from engine.io.files import atomic_path, atomic_write, clean_leftovers, fsync
from engine.io.folders import staged_folder
from engine.runtime import manifest as manifests
from tests.support.folders import model, write_folder

OLD = time.time() - 3600


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test is a run of its own: nothing warned of, no folder cleaned yet."""
    monkeypatch.setattr(notices, "_said", set())
    clean_leftovers.cache_clear()
    yield
    clean_leftovers.cache_clear()


def staged(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".gdpo-sr-")]


@pytest.mark.parametrize(
    "name",
    [
        b"a" * 251 + b".png",
        "\u00e9".encode() * 125 + b".png",
        b"\xff\xfe.png",
        b"no suffix",
        b"x." + b"y" * 250,
        b".png",
    ],
    ids=["255 bytes", "254 bytes of 125 letters", "not UTF-8", "no suffix", "long suffix", "only a suffix"],
)
def test_whatever_name_fits_can_be_written(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    with atomic_path(path) as beside:
        assert beside.parent == tmp_path and len(os.fsencode(beside.name)) <= 40 and beside.name.isascii()
        beside.write_bytes(b"content")
    assert path.read_bytes() == b"content" and os.listdir(os.fsencode(tmp_path)) == [name]


def test_permissions_are_those_of_the_umask_without_a_chmod(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, refuse, raising=False)
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def refusing(monkeypatch, refuses, number):
    real = os.fsync

    def fsync(handle):
        if refuses(os.readlink(f"/proc/self/fd/{handle}")):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_a_share_that_refuses_to_flush_gets_its_files_and_one_warning(tmp_path, monkeypatch, capsys, number):
    refusing(monkeypatch, lambda path: True, number)
    for name in "abc":
        atomic_write(tmp_path / name, name)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["a", "b", "c"]
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_or_is_full_is_no_such_share(tmp_path, monkeypatch, number):
    atomic_write(tmp_path / "a", "before")
    refusing(monkeypatch, lambda path: "partial" in path, number)
    with pytest.raises(OSError) as error:
        atomic_write(tmp_path / "a", "after")
    assert error.value.errno == number
    assert (tmp_path / "a").read_text() == "before" and not staged(tmp_path)
    with pytest.raises(FileNotFoundError):
        fsync(tmp_path / "missing")


def leave(folder: Path, name: str, when: float) -> Path:
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (when, when))
    return path


def test_a_signal_while_the_staged_file_is_made_leaves_none(tmp_path, monkeypatch):
    def interrupted(handle):
        assert list(tmp_path.glob(".gdpo-sr-*.partial.png"))
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "lock", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.png"):
        pass
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_runs_go_and_nothing_else_does(tmp_path):
    gone = [leave(tmp_path, f".gdpo-sr-0123456{i}.partial{s}", OLD) for i, s in enumerate((".png", "", ".jpeg"))]
    kept = [
        leave(tmp_path, ".gdpo-sr-01234567.png", OLD),  # not our pattern
        leave(tmp_path, "x.gdpo-sr-01234567.partial.png", OLD),
        leave(tmp_path, ".gdpo-sr-99999999.partial.png", time.time() + 60),  # younger than this run
    ]
    used = leave(tmp_path, ".gdpo-sr-aaaaaaaa.partial.png", OLD)
    with open(used, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as the run that writes it does
        atomic_write(tmp_path / "a.png", b"new")
        assert [p.exists() for p in gone] == [False] * 3 and all(p.exists() for p in (*kept, used))
    clean_leftovers.cache_clear()
    clean_leftovers(tmp_path)
    assert not used.exists()


def test_where_files_cannot_be_locked_leftovers_go_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "lock", lambda handle, wait=True: None)
    hour = leave(tmp_path, ".gdpo-sr-00000001.partial", OLD)
    week = leave(tmp_path, ".gdpo-sr-00000002.partial", OLD - 7 * 86_400)
    atomic_write(tmp_path / "a", "x")
    assert hour.exists() and not week.exists() and (tmp_path / "a").read_text() == "x"


def test_what_is_being_written_is_locked_and_gone_when_it_fails(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_path(tmp_path / "a.png") as beside:
        code = "import fcntl,sys; fcntl.flock(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code, beside], capture_output=True, text=True)
        assert "BlockingIOError" in other.stderr
        raise ValueError("stop")
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_cleaned_away_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    real, taken = files.lock, []

    def lock(handle, *, wait=True):
        if not taken:  # another process's clean_leftovers was quicker
            taken.append(os.readlink(f"/proc/self/fd/{handle}"))
            os.unlink(taken[0])
        return real(handle, wait=wait)

    monkeypatch.setattr(files, "lock", lock)
    atomic_write(tmp_path / "a", "whole")
    assert taken and (tmp_path / "a").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


def test_a_rename_that_fails_names_the_file_and_not_the_one_beside(tmp_path, monkeypatch):
    def replace(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "a", "x")
    assert caught.value.filename == str(tmp_path / "a") and caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_names_the_file_or_what_it_is_in(tmp_path, number):
    unnamed = OSError(number, os.strerror(number))  # as os.write and BufferedWriter raise it
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.png"):
        raise unnamed
    assert caught.value.filename == str(tmp_path / "a.png") and caught.value.errno == number
    with pytest.raises(OSError) as caught, staged_folder(tmp_path / "model"):
        raise unnamed
    assert caught.value.filename == str(tmp_path / "model")
    with pytest.raises(OSError, match="not all was written") as caught, staged_folder(tmp_path / "model"):
        np.zeros(1 << 20).tofile("/dev/full")
    assert caught.value.filename == str(tmp_path / "model") and caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError) as caught, staged_folder(tmp_path / "model") as inside:
        (inside / "unet" / "config.json").write_text("{}")
    assert caught.value.filename == str(tmp_path / "model" / "unet" / "config.json")
    with pytest.raises(FileNotFoundError) as caught, staged_folder(tmp_path / "model"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.png")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 1 and capsys.readouterr().err == "error: out.png: No space left on device\n"


def test_a_working_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: Path("a.png").resolve() and 0)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the working folder is gone; change to one that is there\n"


def test_sealed_sees_the_whole_file_before_it_has_its_name(tmp_path):
    seen = []
    with atomic_path(tmp_path / "a", sealed=lambda p: seen.append((p.read_text(), (tmp_path / "a").exists()))) as p:
        p.write_text("whole")
    assert seen == [("whole", False)] and (tmp_path / "a").read_text() == "whole"


def test_a_full_disk_names_the_file_that_onnx_runtime_writes(tmp_path):
    source = write_folder(tmp_path / "source", model())
    (tmp_path / "out").mkdir()
    os.symlink("/dev/full", tmp_path / "out" / "generator.onnx")
    with pytest.raises(OSError) as caught:
        optimise(manifests.load(source), source, "generator", tmp_path / "out")
    assert caught.value.errno == errno.EIO and caught.value.filename == str(tmp_path / "out" / "generator.onnx")
    with pytest.raises(OSError) as caught:
        optimise(manifests.load(source), source, "generator", tmp_path / "nowhere")
    assert caught.value.errno == errno.ENOENT and caught.value.filename == str(tmp_path / "nowhere" / "generator.onnx")
