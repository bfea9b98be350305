"""engine._core against Python: the same bits from every piece, the same bytes from the whole, and its arrays."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Upscaler
from engine.runtime import noise, resample, tiles
from engine.runtime.core import library
from engine.runtime.manifest import FolderError

_core = pytest.importorskip("engine._core", reason="engine._core was not built (GDPO_BUILD_CSRC=1 shows why)")


@pytest.mark.parametrize(
    "counter, seed, expected",  # Random123's kat_vectors
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_random123s_published_vectors(counter, seed, expected):
    assert [f"{w:08x}" for w in _core.philox(counter, seed)] == expected.split()


@pytest.mark.parametrize("channels", [1, 4, 8, 13, 48])
@pytest.mark.parametrize("rows, columns", [((0, 17), (0, 200)), ((5, 6), (63, 65)), ((2**32 - 3, 2**32), (7, 71))])
def test_the_noise_has_the_same_bits(channels, rows, columns):
    for seed in (0, 1, 2**64 - 1, 0x0123456789ABCDEF):
        ours = _core.noise_field(seed, channels, rows, columns)
        assert np.array_equal(ours, noise.noise_field(seed, channels, rows, columns)) and ours.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "shape, size",
    [((7, 9), (28, 36)), ((1, 1), (4, 4)), ((50, 60), (21, 22)), ((90, 70), (3, 2)), ((33, 20), (34, 61))],
)
def test_the_resampler_has_the_same_bits(shape, size, dtype):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, np.iinfo(dtype).max + 1, (*shape, 3)).astype(dtype)
    for rows, columns in [((0, size[0]), (0, size[1])), ((-5, size[0] + 40), (1, 2 * size[1] + 3))]:
        ours = _core.resize_window(pixels, size, rows, columns)
        assert np.array_equal(ours, resample.resize_window(pixels, size, rows, columns))
    view = np.zeros((shape[1], shape[0], 5), dtype).transpose(1, 0, 2)[..., 1:4]  # of any strides
    view[...] = pixels
    full = ((0, size[0]), (0, size[1]))
    assert np.array_equal(_core.resize_window(view, size, *full), resample.resize_window(pixels, size, *full))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [1, 16, 100, 128, 129, 300, 1001])
def test_tiles_and_their_weights_are_the_same(size, fixed):
    starts, tile, weights = _core.cover(size, 128, 16, 4, fixed=fixed, resolution=4)
    axis = tiles.cover(size, 128, 16, 4, fixed=fixed)
    assert (tuple(starts), tile) == (axis.starts, axis.tile) and np.array_equal(weights, axis.weights(4))


def test_both_sha256_are_hashlibs():
    from hashlib import sha256

    for length in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000, 100_003):
        content = np.random.default_rng(length).bytes(length)
        assert set(_core.sha256(content)) == {sha256(content).hexdigest()}


@pytest.mark.parametrize(
    "options", [{}, {"color": "wavelet"}, {"scale": 0.6}, {"scale": 5, "color": "wavelet"}], ids=str
)
def test_sixteen_bit_has_the_same_bytes(options, folders):
    rgb = np.random.default_rng(0).integers(0, 65536, (37, 45, 3)).astype(np.uint16)
    cpp, python = (Upscaler.load(folders / "plain", core=core).upscale(rgb, 5, **options) for core in (True, False))
    assert cpp.dtype == np.uint16 and np.array_equal(cpp, python)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bands_are_the_rows_of_the_whole(folders, dtype):
    up = _core.Upscaler(str(folders / "plain"), library=str(library()))
    rgb = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (80, 50, 3)).astype(dtype)
    for options in ({"color": "wavelet"}, {"color": "none", "scale": 2.5}):
        bands = []
        assert up.upscale(rgb, tile=24, sink=lambda *band, to=bands: to.append(band), **options) is None
        whole = up.upscale(rgb, tile=24, **options)
        assert [first for first, _ in bands] == np.cumsum([0, *(len(rows) for _, rows in bands[:-1])]).tolist()
        assert np.array_equal(np.concatenate([rows for _, rows in bands]), whole) and len(bands) > 2

    def full(first, rows):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        up.upscale(rgb, sink=full)
    with pytest.raises(ValueError, match="exclude each other"):
        up.upscale(rgb, np.zeros((320, 200, 3), dtype), sink=full)


def test_the_largest_picture_is_the_callers_choice(folders):
    up = _core.Upscaler(str(folders / "plain"), library=str(library()))
    rgb = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="megapixels; at most"):
        up.upscale(rgb, max_pixels=16 * 64 - 1)
    assert up.upscale(rgb, max_pixels=16 * 64).shape == (32, 32, 3)


def test_weights_beside_the_model_are_hashed_and_used(folders, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    expected = Upscaler.load(folders / "plain", core=True).upscale(rgb)
    for core in (True, False):
        assert np.array_equal(Upscaler.load(folders / "external", core=core).upscale(rgb), expected)
    shutil.copytree(folders / "external", tmp_path / "folder")
    data = bytearray((tmp_path / "folder" / "generator.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "folder" / "generator.onnx.data").write_bytes(data)
    with pytest.raises(FolderError, match=r"generator\.onnx\.data: its SHA-256"):
        Upscaler.load(tmp_path / "folder", core=True)


def test_arrays_come_and_go_without_copies(folders):
    up = _core.Upscaler(str(folders / "plain"), library=str(library()))
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    expected = up.upscale(rgb)
    out = np.zeros((80, 96, 3), np.uint8)
    assert up.upscale(rgb, out) is out and np.array_equal(out, expected)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1).contiguous()  # planes
    planes = torch.zeros((3, 80, 96), dtype=torch.uint8)
    made = up.upscale(tensor.permute(1, 2, 0), planes.permute(1, 2, 0))
    assert torch.equal(made, torch.from_numpy(expected)) and torch.equal(planes, made.permute(2, 0, 1))
    assert np.array_equal(up.upscale(memoryview(rgb)), expected)


@pytest.mark.parametrize(
    "image, out, error, message",
    [
        (np.zeros((4, 4), np.uint8), None, ValueError, r"image must be \[H,W,3\]; got \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), None, ValueError, r"image must be \[H,W,3\]"),
        (np.zeros((4, 4, 3), np.float32), None, ValueError, "uint8 or uint16"),
        (np.zeros((4, 4, 3), np.uint8)[::-1], None, ValueError, "negative stride"),
        (torch.zeros((4, 4, 3)), None, ValueError, "uint8 or uint16"),
        ("photo.jpg", None, TypeError, "must be an array"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((16, 15, 3), np.uint8), ValueError, "out: size must be 16x16"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((16, 16, 3), np.uint16), ValueError, "as many bits"),
        (np.zeros((4, 4, 3), np.uint8), np.broadcast_to(np.uint8(0), (16, 16, 3)), ValueError, "read-only|not writ"),
    ],
    ids=str,
)
def test_bad_arrays_are_refused(folders, image, out, error, message):
    with pytest.raises(error, match=message):
        _core.Upscaler(str(folders / "plain"), library=str(library())).upscale(image, out)


def test_bad_folders_and_numbers_are_pythons_exceptions(folders):
    with pytest.raises(FolderError, match="is not the manifest's"):
        Upscaler.load(folders / "stale", core=True)
    up = Upscaler.load(folders / "plain", core=True)
    rgb = np.zeros((8, 8, 3), np.uint8)
    for options, message in [
        ({"tile": 8}, "tile must be 16 to 256 input pixels"),
        ({"tile": 2**80}, "tile|incompatible"),
        ({"batch": 9}, "batch must be 1 to 8"),
        ({"seed": -1}, "seed must be in"),
        ({"scale": float("nan")}, "scale must be between"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            up.upscale(rgb, **options)
    assert np.array_equal(up.upscale(rgb[::-1]), up.upscale(rgb))  # a copy where a stride is negative


def test_progress_counts_tiles_and_what_it_raises_cancels(folders):
    up, seen = Upscaler.load(folders / "plain", core=True), []
    rgb = np.zeros((60, 60, 3), np.uint8)
    up.upscale(rgb, tile=24, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) > 4

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up.upscale(rgb, tile=24, progress=cancel)


def test_the_gil_is_released_and_threads_share_one_object(folders):
    up = _core.Upscaler(str(folders / "plain"), library=str(library()), concurrency=2)
    rgb = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    expected, results = up.upscale(rgb, seed=3, tile=32), []
    threads = [threading.Thread(target=lambda: results.append(up.upscale(rgb, seed=3, tile=32))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(np.array_equal(r, expected) for r in results)


def seal(folder, manifest) -> None:
    """Write a manifest with the hash that belongs to it."""
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def paths(value, at=()):
    """The way to every value of a manifest."""
    if at:
        yield at
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(part, (*at, key))


def test_a_manifest_that_is_wrong_under_its_right_hash_is_refused_when_it_is_loaded(folders, tmp_path):
    """Each value in turn becomes another one, or is left out: one line, or a folder that works."""
    folder = tmp_path / "folder"
    shutil.copytree(folders / "plain", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    expected = Upscaler.load(folders / "plain", core=True).upscale(rgb)
    wrong = [
        None,
        True,
        -1,
        0,
        1,
        7,
        65537,
        2**64,
        1e300,
        0.5,
        "",
        "a\nb\x1b[31m",
        "../x",
        [],
        {},
        [1, 2, 3],
        {"a": [[]]},
    ]
    refused = 0
    for way in paths(manifest):
        for value in [*wrong, KeyError]:  # KeyError: left out
            mutant = json.loads(json.dumps(manifest))
            place = mutant
            for key in way[:-1]:
                place = place[key]
            if value is KeyError:
                del place[way[-1]]
            else:
                place[way[-1]] = value
            seal(folder, mutant)
            try:
                up = _core.Upscaler(str(folder), library=str(library()))
            except FolderError as error:
                assert str(error).isprintable(), repr(str(error))
                refused += 1
                continue
            made = up.upscale(rgb)  # what loads runs
            assert made.shape == expected.shape
            if way[0] not in ("geometry", "profile"):
                assert np.array_equal(made, expected), way
    assert refused > 600


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a manifest"),
        (b"[]", "no format"),
        (b"null", "no format"),
        (b'{"format": ' + b"[" * 300_000 + b"]" * 300_000 + b"}", "deep"),
        (b'{"format": "\xff"}', "not a manifest"),
        (b'{"format": 1e999}', "not a manifest"),
        (b'{"format": 2}', "its format is 2, this version reads 1"),
    ],
    ids=["empty", "list", "null", "deep", "utf8", "huge", "newer"],
)
def test_json_that_is_no_manifest_is_one_line(folders, tmp_path, content, message):
    folder = tmp_path / "folder"
    shutil.copytree(folders / "plain", folder)
    seal(folder, content)
    with pytest.raises(FolderError, match=message) as error:
        _core.Upscaler(str(folder), library=str(library()))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("geometry", "scale"), 99, "geometry.scale must be 1 to 16; got 99"),
        (("geometry", "factor"), 2**40, "geometry.factor must be 1 to 64; got 1099511627776"),
        (("profile", "batch"), [1, 1, 4096], "profile.batch must be 1 to 1024; got 4096"),
        (("profile", "tile"), [512, 64, 1024], "profile.tile must rise from least to usual to largest; got"),
        (("precision",), "int3", "precision must be one of fp32, fp16, bf16"),
        (("extras",), {"../x": "0" * 64}, "is not a plain file name"),
    ],
    ids=str,
)
def test_numbers_of_a_manifest_have_ranges(folders, tmp_path, where, value, message):
    folder = tmp_path / "folder"
    shutil.copytree(folders / "plain", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    place = manifest
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    seal(folder, manifest)
    with pytest.raises(FolderError, match=re.escape(message)):
        _core.Upscaler(str(folder), library=str(library()))


def test_loading_again_and_again_leaves_nothing_behind(folders):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    rgb = np.zeros((16, 16, 3), np.uint8)
    for count in range(200):
        _core.Upscaler(str(folders / "plain"), library=str(library())).upscale(rgb)
        if count == 40:
            before = resident()
    assert resident() < before + 4e6


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python's own, of forks beside threads
def test_a_forked_child_is_told_to_load_again(folders):
    up = _core.Upscaler(str(folders / "plain"), library=str(library()))
    rgb = np.zeros((60, 60, 3), np.uint8)
    expected = up.upscale(rgb)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            up.upscale(rgb)
        except RuntimeError as error:
            code = int("load it here again" not in str(error))
            del up  # must not wait for the parent's threads
        finally:
            os._exit(code)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0 and np.array_equal(up.upscale(rgb), expected)


@pytest.mark.parametrize("name", ["generator.onnx", "manifest.json", "manifest.sha256"])
def test_no_mutant_of_a_folder_loads(folders, tmp_path, name):
    """The bytes are hashed before a backend sees them: not one of these gets past."""
    folder = tmp_path / "folder"
    shutil.copytree(folders / "plain", folder)
    original, rng = (folder / name).read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(original)
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(data if rng.random() < 0.7 else data[:at])
        with pytest.raises(FolderError, match=r"damaged|SHA-256"):
            _core.Upscaler(str(folder), library=str(library()))


def ambiguous(content: bytes) -> dict[str, bytes]:
    """What two readers of JSON may take for two manifests."""
    return {
        "a name twice": content.rstrip()[:-1] + b', "precision": "fp16"}',
        "a name twice, the right one last": content.replace(b"{", b'{"precision": "fp16", ', 1),
        "a name twice, one escaped": content.rstrip()[:-1] + b', "precisi\\u006fn": "fp16"}',
        "a zero byte": content + b"\0",
        "more after a zero byte": content + b"\0{}",
        "more after the end": content + b"{}",
        "a byte order mark": b"\xef\xbb\xbf" + content,
        "a comment": b"// made by hand\n" + content,
        "a comma too much": content.rstrip()[:-1] + b",}",
    }


WRONG = {
    "version of several lines": lambda m: m.update(backend_version="1\n2"),
    "version with a zero": lambda m: m.update(backend_version="1\0"),
    "a long version": lambda m: m.update(backend_version="1" * 1001),
    "version beyond ASCII": lambda m: m.update(backend_version="1\u202e"),
    "an invisible architecture": lambda m: m.update(architecture="sm_90\t"),
    "no architecture": lambda m: m.pop("architecture"),
    "source without hashes": lambda m: m.update(source={"generator": [1]}),
    "a source of several lines": lambda m: m.update(source={"a\nb": "0" * 64}),
    "more of a graph": lambda m: m["graphs"]["generator"].update(more=1),
    "more of a tensor": lambda m: m["graphs"]["generator"]["output"].update(more=1),
    "a file for two": lambda m: m["graphs"]["generator"].update(data={m["graphs"]["generator"]["file"]: "0" * 64}),
    "the manifest as a graph": lambda m: m["graphs"]["generator"].update(file="manifest.json"),
    "a factor that the graph does not have": lambda m: m["geometry"].update(factor=1),
}


def load_hashed_again(folder: Path, content: bytes, core: bool) -> None:
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
    _core.Upscaler(str(folder), library=str(library())) if core else Upscaler.load(folder, core=False)


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_manifest_that_is_wrong_is_refused_by_both_when_it_is_loaded(folders, tmp_path, change, core):
    folder = shutil.copytree(folders / "plain", tmp_path / "folder")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    with pytest.raises(FolderError):
        load_hashed_again(folder, json.dumps(manifest).encode(), core)


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("wrong", ambiguous(b"{}"))
def test_a_manifest_that_programs_read_differently_is_refused_by_both(folders, tmp_path, wrong, core):
    folder = shutil.copytree(folders / "plain", tmp_path / "folder")
    content = ambiguous((folder / "manifest.json").read_bytes())[wrong]
    with pytest.raises(FolderError, match="name twice" if "twice" in wrong else "not a manifest"):
        load_hashed_again(folder, content, core)
