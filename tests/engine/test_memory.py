"""Memory: flat over a long folder, bounded for a large picture. Each is measured in a process of its own."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.folders import model, write_folder

ROOT = Path(__file__).parents[2]

LOOP = """
import ctypes, sys
from pathlib import Path
import numpy as np
from engine.io.images import Picture, read_image, write_image
from engine.runtime.upscaler import Upscaler

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info

def in_use():
    info = mallinfo2()
    return (info.used + info.mapped) / 2**20

up, out = Upscaler.load(sys.argv[1], threads=1), Path(sys.argv[2])
early, last = int(sys.argv[3]), int(sys.argv[4])
rng = np.random.default_rng(0)
sizes = rng.integers(40, 200, (early, 2))  # many sizes are the hard case; none is new after the first look
seen = {}
for i in range(1, last + 1):
    height, width = sizes[i % early]
    write_image(out / "in.png", Picture(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    picture = read_image(out / "in.png")
    write_image(out / "out.png", Picture(up.upscale(picture.pixels, color=("adain", "wavelet")[i % 2])))
    if i in (early, last):
        seen[i] = in_use()
print(seen[early], seen[last])
"""

FOLDER = """
import sys
from pathlib import Path
import numpy as np
from engine import upscale
from engine.io.images import Picture, write_image
from engine.worker import Worker

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

model, out, early, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng, seen, one = np.random.default_rng(0), [], Worker._one
sizes = rng.integers(40, 200, (early, 2))
(out / "in").mkdir()
for i in range(last + 1):
    height, width = sizes[i % early]
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    write_image(out / "in" / f"{i:03}.png", Picture(noise))

def look(*arguments):
    seen.append(resident())  # after the pictures before this one
    return one(*arguments)

Worker._one = look
sys.argv = ["upscale", str(out / "in"), str(out / "out"), "--model", model, "--threads", "1", "--no-progress"]
assert upscale.main() == 0
print(seen[early], seen[last])
"""

LARGE = """
import resource, sys
sys.argv = ["upscale", *sys.argv[1:]]
from pathlib import Path
from engine import upscale
code = upscale.main()
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(code, int(line.split()[1]) / 1024)
"""

STREAM = """
import sys
from pathlib import Path
import numpy as np
from engine.io.images import Picture, image_writer

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

height, width, alpha = 6000, 5000, sys.argv[1].endswith("png")
small = np.zeros((1, 1, 3), np.uint8)
band = np.repeat(np.arange(width, dtype=np.uint32)[None, :, None] // 7 % 256, 60, 0).repeat(3, 2).astype(np.uint8)
seen = []
for path, rows in ((Path(sys.argv[1]).with_stem("warm"), 60), (Path(sys.argv[1]), height)):
    with image_writer(path, Picture(small, alpha=small[..., 0] if alpha else None), (rows, width)) as put:
        for _ in range(0, rows, 60):
            put(band, band[..., 0] if alpha else None)
    seen.append(peak())
print(*seen)
"""


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return [float(x) for x in done.stdout.split()]


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_folder(tmp_path / "model", model())


LONG = [(30, 60, 1.10), pytest.param(30, 300, 1.03, marks=pytest.mark.slow)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("early, last, growth", LONG)
def test_a_long_folder_takes_no_more_memory_than_a_short_one(plain, tmp_path, early, last, growth):
    first, final = python(FOLDER, plain, tmp_path, early, last)
    print(f"{early} pictures: {first:.1f} MiB, {last} pictures: {final:.1f} MiB")
    assert final <= growth * first


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("early, last, growth", LONG)
def test_nothing_is_held_after_a_picture(plain, tmp_path, early, last, growth):
    """What a program of its own sees; its C library may keep some of what is free."""
    first, final = python(LOOP, plain, tmp_path, early, last)
    print(f"{early} pictures: {first:.1f} MiB, {last} pictures: {final:.1f} MiB in use")
    assert final <= growth * first


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "width, height, limit", [(600, 500, 400), pytest.param(2000, 1500, 1500, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("color", [pytest.param("adain", marks=pytest.mark.slow), "wavelet"])
def test_a_large_picture_takes_bounded_memory(tiny_engine, tmp_path, width, height, limit, color):
    from engine.io.images import Picture, read_image, write_image

    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)
    write_image(tmp_path / "in.png", Picture(pixels))
    code, peak = python(LARGE, tmp_path / "in.png", tmp_path / "out.jpg", "--model", tiny_engine, "--color", color)
    print(f"{16 * width * height / 1e6:.0f} megapixels: {peak:.0f} MiB")
    assert code == 0 and peak < limit
    assert read_image(tmp_path / "out.jpg").pixels.shape == (4 * height, 4 * width, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_rows_are_encoded_as_they_come(tmp_path, suffix):
    """A picture of 86 MiB (114 with its mask) is written in a fraction of that, and is all there."""
    from engine.io.images import picture_size

    small, large = python(STREAM, tmp_path / f"out.{suffix}")
    print(f"{suffix}: {small:.0f} MiB for 60 rows, {large:.0f} MiB for 6000")
    assert large - small < 40
    assert picture_size(tmp_path / f"out.{suffix}") == (6000, 5000)
