"""What a sample shows depends on (seed, sample) alone: not on workers, batches, or where a run was interrupted."""

import json
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from engine.io.images import ImageError
from engine.io.profiles import profile_of
from gdpo.photos import folder as folder_of_pictures
from gdpo.photos.dataset import CropDataset, loader
from gdpo.photos.folder import listing, natural, picture_sizes
from tests.support.pictures import SRGB, save

NAMES = ["crop1.png", "crop2.png", "crop10.png", "wide.png", "deep/tall.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures whose pixels tell where they come from: red the row, green the column, blue the picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    for i, name in enumerate(NAMES):
        height, width = (40, 90) if name == "wide.png" else (70, 33) if "tall" in name else (32, 32)
        y, x = np.mgrid[:height, :width]
        Image.fromarray(np.stack([y, x, np.full_like(x, i)], 2).astype(np.uint8)).save(folder / name)
    (folder / "README.txt").write_text("not a picture")
    (folder / ".hidden.png").write_text("not a picture")
    return folder


def values(hr):
    return (hr * 255).round().to(torch.uint8)


def test_a_plain_folder_is_read_in_natural_order(folder):
    data = CropDataset(folder, "train", 32)
    assert data.names == ["crop1.png", "crop2.png", "crop10.png", "deep/tall.png", "wide.png"]
    assert data.captions is None and len(data) == 5
    assert sorted(["b10", "B9", "a", "b010"], key=natural) == ["a", "B9", "b010", "b10"]


def test_every_picture_once_an_epoch_in_an_order_drawn_anew(folder):
    data = CropDataset(folder, "train", 16)
    epochs = [[data.index_of(e * 5 + i, seed=3) for i in range(5)] for e in range(6)]
    assert all(sorted(e) == list(range(5)) for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert epochs[1] != [data.index_of(5 + i, seed=4) for i in range(5)] or epochs[0] != epochs[1]
    assert epochs[4] == [CropDataset(folder, "train", 16).index_of(20 + i, seed=3) for i in range(5)]


def test_crops_are_whole_upright_squares_that_vary(folder):
    data = CropDataset(folder, "train", 16)
    index = data.names.index("wide.png")
    corners, ways = set(), set()
    for sample in range(300):
        item = data.item(index, seed=0, sample=sample)
        hr = values(item["hr"]).int()
        assert item["hr"].shape == (3, 16, 16) and item["hr"].dtype == torch.float32
        y, x = hr[0], hr[1]
        corners.add((int(y.min()), int(x.min())))
        assert y.max() - y.min() == x.max() - x.min() == 15 and (hr[2] == 3).all()  # one 16x16 window of one picture
        ways.add(tuple((hr[:2, 0, 0] - hr[:2, 0, 1]).tolist() + (hr[:2, 0, 0] - hr[:2, 1, 0]).tolist()))
    assert len(ways) == 8  # the symmetries of the square
    assert {c[0] for c in corners} == set(range(25)) and max(c[1] for c in corners) > 65


def test_validation_is_the_centre_in_order(folder):
    data = CropDataset(folder, "val", 16)
    assert [data.index_of(i, seed=9) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    hr = values(data.item(data.names.index("wide.png"), seed=9, sample=123)["hr"])
    assert hr[0, 0].unique().tolist() == [12] and hr[1, 0].tolist() == list(range(37, 53))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_only_on_seed_and_samples(folder, workers):
    data = CropDataset(folder, "train", 16)
    torch.manual_seed(workers)
    before = torch.random.get_rng_state()
    [one, two] = loader(data, [[7, 8, 9, 10], [11]], seed=5, num_workers=workers)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's randomness was touched
    assert one.samples == [7, 8, 9, 10] and one.hr.shape == (4, 3, 16, 16) and one.captions is None
    [again] = loader(data, [[9, 11]], seed=5)
    assert torch.equal(again.hr, torch.stack([one.hr[2], two.hr[0]])) and again.names == [one.names[2], two.names[0]]
    [other] = loader(data, [[7, 8, 9, 10]], seed=6)
    assert not torch.equal(other.hr, one.hr)


def test_a_dataset_survives_pickling(folder):
    data = CropDataset(folder, "train", 16)
    copy = pickle.loads(pickle.dumps(data))
    assert [copy.index_of(i, seed=1) for i in range(9)] == [data.index_of(i, seed=1) for i in range(9)]


def test_sixteen_bits_fill_the_same_range(tmp_path):
    import pyvips

    pyvips.Image.new_from_array(np.full((8, 8, 3), 65535, np.uint16)).copy(interpretation="rgb16").write_to_file(
        str(tmp_path / "deep.png")
    )
    assert CropDataset(tmp_path, "val", 8).item(0, seed=0, sample=0)["hr"].unique().tolist() == [1.0]


def test_pictures_of_other_colours_become_srgb(tmp_path):
    """Display P3 by a profile or by PNG's tags, and an LR's too; what is sRGB by a profile keeps its numbers."""
    p3, flat = {"cICP": bytes([12, 13, 0, 1])}, np.full((64, 64, 3), (200, 100, 100), np.uint8)
    for folder, side in (("hr", 64), ("lr", 16)):
        save(tmp_path / folder / "0.png", flat[:side, :side], icc=profile_of(p3))
        save(tmp_path / folder / "1.png", flat[:side, :side], color_tags=p3)
        save(tmp_path / folder / "2.png", flat[:side, :side], icc=SRGB)
        save(tmp_path / folder / "3.png", flat[:side, :side])
    expected = [[215, 92, 97]] * 2 + [[200, 100, 100]] * 2  # by hand: see tests/engine/test_picture_colors.py
    pairs = CropDataset(tmp_path / "hr", "val", 32, lr=tmp_path / "lr", progress=False)
    alone = CropDataset(tmp_path / "hr", "val", 32, progress=False)
    for i, levels in enumerate(expected):
        real = pairs.item(i, seed=0, sample=i)
        for crop in (alone.item(i, seed=0, sample=i)["hr"], real["hr"], real["lr"]):
            off = np.abs(values(crop).numpy() - np.array(levels)[:, None, None]).max()
            assert off <= (1 if i < 2 else 0)


def test_a_picture_in_hdr_is_named(tmp_path):
    save(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8), color_tags={"cICP": bytes([9, 16, 0, 1])})
    with pytest.raises(ImageError, match=r"a\.png: its tags name HDR"):
        CropDataset(tmp_path, "train", 32, progress=False).item(0, seed=0, sample=0)


def test_a_prepared_folder_has_splits_and_captions(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / split / f"{i}.png")
    names = ["train/2.png", "train/0.png", "train/1.png", "val/0.png"]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps({"file": n, "size": 16}) + "\n" for n in names))
    (tmp_path / "sheet.png").write_text("a sheet is not a crop")
    assert CropDataset(tmp_path, "train", 16).names == names[:3]
    assert CropDataset(tmp_path, "val", 16).names == names[3:]
    rows = [json.dumps({"file": n, "caption": f"picture {n}"}) + "\n" for n in names]
    (tmp_path / "captions.jsonl").write_text("".join(rows))
    [batch] = loader(CropDataset(tmp_path, "train", 16), [[0, 1]], seed=0)
    assert batch.captions == [f"picture {n}" for n in batch.names]
    (tmp_path / "captions.jsonl").write_text(rows[0])
    with pytest.raises(ValueError, match=r"captions\.jsonl has no caption for 2 of 3 pictures, the first train/0\.png"):
        CropDataset(tmp_path, "train", 16)
    (tmp_path / "captions.jsonl").write_text(rows[0] + "nonsense\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2: not a JSON object"):
        CropDataset(tmp_path, "train", 16)
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png is missing.*run gdpo\.prepare again"):
        CropDataset(tmp_path, "train", 16)


def test_the_fingerprint_sees_added_and_changed_files(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    first = CropDataset(tmp_path, "train", 16).fingerprint
    assert CropDataset(tmp_path, "train", 8).fingerprint == first
    Image.effect_noise((16, 16), 50).save(tmp_path / "a.png")
    changed = CropDataset(tmp_path, "train", 16).fingerprint
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    assert len({first, changed, CropDataset(tmp_path, "train", 16).fingerprint}) == 3


def test_bad_folders_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        CropDataset(tmp_path / "no", "train", 16)
    with pytest.raises(ValueError, match="holds no pictures"):
        CropDataset(tmp_path, "train", 16)
    with pytest.raises(ValueError, match="split must be one of train, val; got 'test'"):
        CropDataset(tmp_path, "test", 16)
    with pytest.raises(ValueError, match="crop_size must be positive; got 0"):
        CropDataset(tmp_path, "train", 0)
    Image.new("RGB", (64, 31)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png is 64x31, smaller than the crop size 32"):
        CropDataset(tmp_path, "train", 32)
    (tmp_path / "small.png").write_text("a text file")
    with pytest.raises(ValueError, match=r"small\.png is not a picture"):
        CropDataset(tmp_path, "train", 32)
    with pytest.raises(ValueError, match=r"small\.png is not a picture"):
        CropDataset(tmp_path, "train", 32, skip_broken=True)  # nothing would be left
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    data = CropDataset(tmp_path, "train", 32, skip_broken=True)
    assert data.names == ["whole.png"] and re.search(r"small\.png is not a picture", *data.notes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_when_it_is_read(tmp_path, workers):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    line = rf"^{re.escape(str(path))}: damaged or truncated picture [^\n]*$"  # and no traceback of a worker
    with pytest.raises(ImageError, match=line):
        list(loader(CropDataset(tmp_path, "train", 32), [[0]], seed=0, num_workers=workers))


def test_a_captions_file_that_is_no_text_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_bytes(b'{"file": "a.png", "caption": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl is not UTF-8 text"):
        CropDataset(tmp_path, "train", 32)


def test_a_caption_is_text(tmp_path):
    """Null is none, and a mark at the file's beginning belongs to no line."""
    for name in "ab":
        Image.effect_noise((64, 64), 50).save(tmp_path / f"{name}.png")
    rows = '{"file": "a.png", "caption": "noise"}\n{"file": "b.png", "caption": null}\n'
    (tmp_path / "captions.jsonl").write_text(rows, "utf-8-sig")
    with pytest.raises(ValueError, match=r"has no caption for 1 of 2 pictures, the first b\.png"):
        CropDataset(tmp_path, "train", 32)
    assert CropDataset(tmp_path, "train", 32, captions=False).captions is None
    (tmp_path / "captions.jsonl").write_text(rows.replace("null", '"more"'), "utf-8-sig")
    assert CropDataset(tmp_path, "train", 32).captions == ["noise", "more"]


@pytest.fixture
def store(tmp_path):
    """A store of three pictures, and a folder of links."""
    for name in ("store/a.png", "store/b.png", "store/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / name)
    (tmp_path / "links").mkdir()
    return tmp_path


def test_links_are_followed_each_file_once_and_loops_end(store):
    links = store / "links"
    (links / "all").symlink_to(store / "store")
    (links / "again").symlink_to(store / "store" / "deep")  # below what "all" leads to
    (links / "one.png").symlink_to(store / "store" / "a.png")
    (links / "circle").symlink_to(links)
    (store / "store" / "deep" / "up").symlink_to(store / "store")
    Image.effect_noise((40, 40), 50).save(links / "own.png")
    names = CropDataset(links, "train", 32).names
    assert len(names) == 4
    real = {(links / name).resolve() for name in names}
    assert real == {store / "store/a.png", store / "store/b.png", store / "store/deep/c.png", links / "own.png"}


@pytest.mark.parametrize("name", ["gone.png", "gone"])
def test_a_dangling_link_is_named_with_where_it_leads(name, store):
    Image.effect_noise((40, 40), 50).save(store / "links" / "own.png")
    (store / "links" / name).symlink_to("/nowhere/x")
    with pytest.raises(ValueError, match=rf"{name} is a link to /nowhere/x, which is not there; mend or remove it"):
        CropDataset(store / "links", "train", 32)
    data = CropDataset(store / "links", "train", 32, skip_broken=True)
    assert "own.png" in data.names and any(f"left out: {store}/links/{name}" in note for note in data.notes)


def test_small_pictures_are_counted_at_once_and_left_out_when_asked(tmp_path):
    for i, side in enumerate((40, 20, 30, 64)):
        Image.effect_noise((side, 64), 50).save(tmp_path / f"{i}.png")
    line = r"1\.png is 20x64, smaller than the crop size 32, as are 1 more of 4 pictures"
    with pytest.raises(ValueError, match=rf"{line}; to leave them out: --data\.skip_small true"):
        CropDataset(tmp_path, "train", 32)
    data = CropDataset(tmp_path, "train", 32, skip_small=True)
    assert data.names == ["0.png", "3.png"] and re.search(line, *data.notes)
    for name in ("1.png", "2.png"):
        (tmp_path / name).unlink()
    assert CropDataset(tmp_path, "train", 32).fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="smaller than the crop size 100"):
        CropDataset(tmp_path, "train", 100, skip_small=True)  # nothing would be left


PAIRS = {
    "folders": ["HR/1.png", "LR/1.png"],
    "folders below": ["Canon/Test/hr/1.png", "Canon/Test/lr_x4/1.png"],
    "DIV2K": ["DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X4/0001x4.png"],
    "BasicSR's test sets": ["Set5/GTmod12/baby.png", "Set5/LRbicx4/baby.png"],
    "names": ["Canon_001_HR.png", "Canon_001_LR4.png"],
    "GT": ["GT/1.png", "LQ/1.png"],
}
ALONE = [
    ["HR/1.png", "more/1.png"],
    ["lrs/1.png", "hrs/2.png"],
    ["1_HR.png", "2_LR4.png"],
    ["a/HR/1.png", "b/LR/1.png"],
]


@pytest.mark.parametrize("names", [*PAIRS.values(), *ALONE], ids=str)
def test_lr_pictures_are_never_taken_for_hr_ones(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50).save(tmp_path / name)
    if names in ALONE:
        assert len(CropDataset(tmp_path, "train", 32)) == len(names)
    else:
        with pytest.raises(ValueError, match="the LR pictures would be taken for HR ones; name a folder that holds"):
            CropDataset(tmp_path, "train", 32)


def test_formats_that_are_only_read_are_trained_on(tmp_path):
    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "a.bmp")
    data = CropDataset(tmp_path, "val", 32)
    assert data.names == ["a.bmp"] and data.item(0, seed=0, sample=0)["hr"].shape == (3, 32, 32)


def test_formats_that_are_not_read_are_said(tmp_path):
    Image.effect_noise((40, 40), 50).save(tmp_path / "a.png")
    (tmp_path / "b.nef").write_bytes(b"of a camera")
    (tmp_path / "note.txt").write_text("no picture")
    data = CropDataset(tmp_path, "train", 32)
    assert data.names == ["a.png"] and re.search(r"1 file\(s\) of formats that are not read \(\.nef\)", *data.notes)


def test_headers_are_read_once_and_what_changed_again(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = []
    real = folder_of_pictures.picture_size
    monkeypatch.setattr(folder_of_pictures, "picture_size", lambda path: (opened.append(path.name), real(path))[1])
    for i in range(5):
        Image.effect_noise((40 + i, 40), 50).save(folder / f"{i}.png")
    expected = picture_sizes(listing(folder))
    assert expected == [(40 + i, 40) for i in range(5)] and opened == [f"{i}.png" for i in range(5)]
    opened.clear()
    data = CropDataset(folder, "train", 32)
    assert data.held_out().names == data.names and not opened
    Image.effect_noise((50, 50), 50).save(folder / "3.png")
    Image.effect_noise((60, 60), 50).save(folder / "5.png")
    assert picture_sizes(listing(folder)) == [*expected[:3], (50, 50), expected[4], (60, 60)]
    assert opened == ["3.png", "5.png"]

    [cache] = (tmp_path / "cache").rglob("*.npz")
    for damage in (b"", cache.read_bytes()[:-20], b"PK" + bytes(99)):  # never believed, never fatal
        cache.write_bytes(damage)
        opened.clear()
        assert len(picture_sizes(listing(folder))) == 6 and len(opened) == 6
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(picture_sizes(listing(folder))) == 6


def test_a_start_takes_little_memory_for_each_picture(tmp_path, monkeypatch):
    """A process that trains holds 350 MB of libraries; 200,000 pictures may take 150 more, also on the way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, count = tmp_path / "pictures", 3000
    folder.mkdir()
    Image.effect_noise((40, 40), 50).save(tmp_path / "one.png")
    for i in range(count):
        (folder / f"photo{i // 20:06d}-ab12cd34-{i % 20:05d}-00000.png").hardlink_to(tmp_path / "one.png")
    CropDataset(folder, "train", 32)
    tracemalloc.start()
    try:
        data = CropDataset(folder, "train", 32)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data) == count and peak / count < 750
