"""No picture is lost in silence: disks that are full, that lie, and a library that cannot be loaded."""

import errno
import io
import os
import sys

import numpy as np
import pytest

from engine.io import sink
from engine.io.formats import FORMATS
from engine.io.images import ImageError, Picture, write_image
from tests.support.pictures import exif_block, gradient, needs

WRITABLE = [row for row in FORMATS if row.write]


class Full(io.FileIO):
    """A disk with room for some bytes: writes end short, then fail, or are swallowed whole."""

    room, swallows = 2000, False

    def write(self, data):
        left = max(self.room - self.tell(), 0)
        if not left and not self.swallows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(memoryview(data)[:left])
        if self.swallows:
            self.seek(len(data) - written, io.SEEK_CUR)
        return len(data) if self.swallows else written


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("swallows", [False, True])
def test_a_full_disk_loses_no_picture_in_silence(tmp_path, monkeypatch, row, deep, swallows, capfd):
    needs(row.name)
    pixels = np.random.default_rng(0).integers(0, 65536, (60, 70, 3)).astype(np.uint16)
    picture = Picture(pixels if deep else (pixels >> 8).astype(np.uint8), exif=exif_block()[6:])
    path = tmp_path / f"a{row.suffixes[0]}"
    write_image(path, picture)
    good = path.read_bytes()
    monkeypatch.setattr(sink, "open", lambda p, mode, buffering: Full(p, "r+"), raising=False)
    monkeypatch.setattr(Full, "swallows", swallows)
    for Full.room in (0, 1, 30, 2000, len(good) - 1):
        with pytest.raises(OSError) as error:
            write_image(path, picture)
        assert error.value.errno == (errno.EIO if swallows else errno.ENOSPC) and error.value.filename == str(path)
        assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]
    assert capfd.readouterr() == ("", "")
    Full.room = len(good)
    write_image(path, picture)
    assert path.read_bytes() == good


def test_a_library_that_cannot_be_loaded_for_want_of_memory_is_one_line(tmp_path, monkeypatch):
    """pyvips tells of the system's library, which it looks for last."""

    class Loader:
        def find_spec(self, name, path=None, target=None):
            if name == "pyvips":
                raise OSError("cannot load library 'libvips.so.42'")

    monkeypatch.delitem(sys.modules, "pyvips", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Loader(), *sys.meta_path])
    with pytest.raises(ImageError, match=r"a\.png: libvips could not be loaded; is there enough memory"):
        write_image(tmp_path / "a.png", Picture(gradient()))
    assert not os.listdir(tmp_path)


class Lying(io.FileIO):
    """A disk that swallows every write from number `at` on, wherever in the file it goes, and claims success."""

    at = writes = 0

    def write(self, data):
        Lying.writes += 1
        if not self.at or self.writes < self.at:
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


@pytest.mark.parametrize("row", WRITABLE, ids=lambda row: row.name)
def test_no_write_is_lost_in_silence(tmp_path, monkeypatch, row):
    needs(row.name)
    monkeypatch.setattr(sink, "open", lambda p, mode, buffering: Lying(p, "r+"), raising=False)
    picture, path = Picture(gradient(), exif=exif_block()[6:]), tmp_path / f"a{row.suffixes[0]}"
    monkeypatch.setattr(Lying, "at", 0)
    monkeypatch.setattr(Lying, "writes", 0)
    write_image(path, picture)
    good, writes = path.read_bytes(), Lying.writes
    for Lying.at in range(1, writes + 1):
        Lying.writes = 0
        with pytest.raises(OSError, match=r"on the disk|something else than was|lost what was|encoder failed"):
            write_image(path, picture)
        assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


def test_writes_that_a_disk_swallows_are_seen_by_the_size(tmp_path):
    (tmp_path / "a").touch()
    with Full(tmp_path / "a", "r+") as file:
        file.room, file.swallows = 10, True
        checked = sink.Sink(file)
        checked.write(b"0123456789")
        checked.close()
        checked.write(b"lost")
        with pytest.raises(OSError, match="10 bytes are on the disk where 14 were written"):
            checked.close()
