"""A folder is replaced whole or not at all."""

import os

import pytest

from engine.io.folders import staged_folder


def write(target, text):
    with staged_folder(target) as folder:
        (folder / "file").write_text(text)


def test_replaces_and_leaves_nothing_behind(tmp_path):
    write(tmp_path / "model", "old")
    write(tmp_path / "model", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "new"


def test_an_error_inside_keeps_the_old_folder(tmp_path):
    write(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("half")
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_keeps_the_old_folder(tmp_path, monkeypatch, failing):
    write(tmp_path / "model", "old")
    real, calls = os.replace, iter(range(1, 10))

    def replace(a, b):
        if next(calls) == failing:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "model", "new")
    assert (tmp_path / "model" / "file").read_text() == "old"


@pytest.mark.parametrize("deadly", [1, 2])
def test_killed_at_a_rename_loses_nothing(tmp_path, deadly):
    write(tmp_path / "model", "old")
    pid = os.fork()
    if pid == 0:
        real, calls = os.replace, iter(range(1, 10))
        os.replace = lambda a, b: os._exit(9) if next(calls) == deadly else real(a, b)
        write(tmp_path / "model", "new")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "model"):
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "old"
