"""Which file becomes which, before any work."""

import os
import unicodedata
from pathlib import Path

import pytest

from engine.jobs import plan


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))  # sizes differ, as pictures' do
    return folder


def targets(jobs) -> list[str]:
    return [job.target.name for job in jobs]


def test_a_folder_says_how_many_files_of_other_kinds_it_leaves_out(tmp_path):
    folder = touch(
        tmp_path / "in", "a.png", "b.JPG", "c.xcf", "d.xcf", "notes", ".hidden.png", "deep/e.psd", "deep/f.png"
    )
    said = []
    assert targets(plan([str(folder)], str(tmp_path / "o"), notice=said.append)) == ["a.png", "b.JPG"]
    assert said == [f"{folder}: 3 of 5 files left out; they are of other kinds (2 .xcf, 1 without suffix)"]
    said.clear()
    jobs = plan([str(folder)], str(tmp_path / "o"), recursive=True, notice=said.append)
    assert targets(jobs) == ["a.png", "b.JPG", "f.png"] and "4 of 7 files left out" in said[0]
    said.clear()
    (folder / "deep/g.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "deep/h.png")
    plan([str(folder / "deep")], str(tmp_path / "o"), notice=said.append)
    words = "1 .psd, 1 link to nothing, 1 pipe or device"
    assert said == [f"{folder}/deep: 3 of 4 files left out; they are of other kinds ({words})"]
    said.clear()
    plan([str(folder / "a.png")], str(tmp_path / "o.png"), notice=said.append)
    assert said == []


def test_an_input_is_not_overwritten_through_another_name_of_its(tmp_path):
    """A hard link stands for what a file system without case, or with one Unicode form, does with names."""
    folder = touch(tmp_path / "in", "a.png")
    os.link(folder / "a.png", folder / "A.PNG")
    with pytest.raises(ValueError, match=r"A\.PNG is an input: it would be overwritten"):
        plan([str(folder / "a.png")], str(folder / "A.PNG"))
    (job,) = plan([str(folder / "a.png")], str(folder / "A.PNG"), on_clash="rename")
    assert job.target == folder / "A-2.PNG"
    (tmp_path / "link.png").symlink_to(folder / "a.png")
    with pytest.raises(ValueError, match="is an input"):
        plan([str(folder / "a.png")], str(tmp_path / "link.png"))


def test_names_that_some_file_systems_take_for_one_clash(tmp_path):
    for one, other in (("A.png", "a.PNG"), ("\u00e9.png", unicodedata.normalize("NFD", "\u00e9.png"))):
        x, y = touch(tmp_path / "x", one), touch(tmp_path / "y", other)
        inputs = [str(x / one), str(y / other)]
        with pytest.raises(ValueError, match=r"would both be written to .*--on-clash rename"):
            plan(inputs, str(tmp_path / "out"))
        first, second = plan(inputs, str(tmp_path / "out"), on_clash="rename")
        assert first.target.name == one and second.target.stem == f"{Path(other).stem}-2"


def test_clashes_are_numbered_and_no_number_is_taken_twice(tmp_path):
    folder = touch(tmp_path / "in", "a-2.png", "a.jpg", "a.png", "a.tif")
    jobs = plan([str(folder)], str(tmp_path / "out"), extension="png", on_clash="rename")
    assert targets(jobs) == ["a-2.png", "a.png", "a-3.png", "a-4.png"]
    assert jobs == plan([str(folder)], str(tmp_path / "out"), extension="png", on_clash="rename")


@pytest.mark.parametrize("pattern, found", [("photos [2024]/*.png", ["a.png", "b.png"]),
                                            ("photos [2024]/[a].png", ["a.png"]), ("pho*/b*", ["b.png"]),
                                            ("**/[ab].png", ["a.png", "b.png"])])  # fmt: skip
def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path, monkeypatch, pattern, found):
    touch(tmp_path / "photos [2024]", "a.png", "b.png")
    monkeypatch.chdir(tmp_path)
    for text in (pattern, str(tmp_path / pattern)):
        assert targets(plan([text], str(tmp_path / "o"))) == found


def test_an_input_that_is_named_twice_is_one_job(tmp_path):
    folder = touch(tmp_path / "in", "a.png")
    assert len(plan([str(folder / "a.png"), str(folder / "*.png")], str(tmp_path / "out"))) == 1


def test_names_that_are_not_utf8_are_paired(tmp_path):
    name = os.fsdecode(b"\xff.png")
    folder = touch(tmp_path / os.fsdecode(b"in\xfe"), name)
    (job,) = plan([str(folder)], str(tmp_path / "out"))
    assert job.source == folder / name and job.target == tmp_path / "out" / name


def test_thousands_of_pictures_are_paired_in_moments(tmp_path):
    import time

    folder = touch(tmp_path / "in", *(f"{i:05}.png" for i in range(3000)))
    begin = time.process_time()
    assert len(plan([str(folder)], str(folder / "out"), recursive=True)) == 3000
    assert time.process_time() - begin < 3
