"""What a sample shows depends on (seed, sample) alone: not on workers, batches, or where a run was interrupted."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from engine.io.images import ImageError
from gdpo.photos.dataset import CropDataset, loader, natural

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
