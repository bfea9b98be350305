"""Pictures in tar shards and in Hugging Face datasets: read at any place, and a broken one is named."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.io.images import ImageError
from gdpo.photos import folder as folder_of_pictures
from gdpo.photos.dataset import CropDataset, loader


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(seed: int, side: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1) / 255


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def two_shards(root: Path) -> Path:
    """Three pictures with captions in each of F-00.tar and F-01.tar."""
    for n in range(2):
        files = {}
        for i in range(3):
            files[f"{n}{i}.png"] = png(10 * n + i)
            files[f"{n}{i}.txt"] = f"picture {n}{i}\n".encode()
        shard(root / f"F-{n:02d}.tar", files)
    return root


@pytest.mark.parametrize("name", ["F-{00..01}.tar", "F-*.tar", "."])
def test_shards_are_read_at_any_place(name, tmp_path):
    data = CropDataset(two_shards(tmp_path) / name, "val", 48)
    assert data.names == [f"F-{n:02d}/{n}{i}.png" for n in range(2) for i in range(3)]
    assert data.captions == [f"picture {n}{i}" for n in range(2) for i in range(3)]
    for index in (4, 0, 5, 1):
        assert torch.equal(data.item(index, seed=0, sample=0)["hr"], pixels(png(index + 7 * (index > 2))))
    train = CropDataset(tmp_path / name, "train", 32)
    [together] = loader(train, [[3, 4, 5, 6]], seed=1, num_workers=2)
    [alone] = loader(train, [[5]], seed=1)
    assert torch.equal(together.hr[2], alone.hr[0]) and together.captions == [
        f"picture {n[5:7]}" for n in together.names
    ]


def test_a_shard_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    from gdpo.photos import archives

    two_shards(tmp_path)
    first = CropDataset(tmp_path, "train", 32)
    monkeypatch.setattr(archives, "_members", None)
    monkeypatch.setattr(archives, "picture_size", None)
    again = CropDataset(tmp_path, "train", 32)
    assert again.names == first.names and again.fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard(tmp_path / "F-01.tar", {"9.png": png(9, 60), "9.txt": b"nine"})
    changed = CropDataset(tmp_path, "train", 32)
    assert len(changed) == 4 and changed.fingerprint != first.fingerprint


def test_pairs_lie_side_by_side_in_shards(tmp_path):
    files = {}
    for i in range(3):
        hr = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for name, part in ((f"{i}.hr.png", hr), (f"{i}.lr.png", hr[::2, ::2])):
            file = io.BytesIO()
            Image.fromarray(part).save(file, "PNG")
            files[name] = file.getvalue()
    path = shard(tmp_path / "p.tar", files)
    data = CropDataset(path, "val", 32, lr=path)
    item = data.item(1, seed=0, sample=0)
    assert len(data) == 3 and torch.equal(item["hr"][:, ::2, ::2], item["lr"])
    hr = CropDataset(path, "val", 32)  # without pairs the LR ones are no training pictures
    assert hr.names == [f"p/{i}.hr.png" for i in range(3)] and "left out: 3 LR pictures" in hr.notes[0]


def test_broken_shards_are_named_and_what_is_whole_of_them_can_be_used(tmp_path):
    path = two_shards(tmp_path) / "F-01.tar"
    whole = path.read_bytes()
    third = whole.index(b"12.png")
    for damaged, files in (
        (whole[: third + 700], 4),  # in the middle of a file
        (whole[:third], 4),  # between two
        (whole[:third] + b"\1" * 2048, 4),
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"F-01\.tar: a broken shard \(.+\); {files} files of it are whole; fetch"
        ):
            CropDataset(tmp_path, "train", 32)
        data = CropDataset(tmp_path, "train", 32, skip_broken=True)
        assert len(data) == 5 and "F-01.tar: a broken shard" in data.notes[0]
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"F-01\.tar: a broken shard \(.+\); 0 files"):
        CropDataset(tmp_path, "train", 32)
    for name, line in (
        ("x.tar", "no such shard"),
        ("x-{0..1}.tar", "x-0.tar: no such shard"),
        ("x-{0..999999999}.tar", "x-0.tar: no such shard"),
        ("x.tar.gz", "plain .tar"),
    ):
        with pytest.raises(ValueError, match=line):
            CropDataset(tmp_path / name, "train", 32)
    with pytest.raises(ValueError, match=r"hold no pictures \(.*\), but a\.txt and the like"):
        CropDataset(shard(tmp_path / "e.tar", {"a.txt": b"text"}), "train", 32)


def test_shards_of_one_name_are_told_apart(tmp_path):
    """x/0.tar and y/0.tar hold other pictures of the same names, with other captions."""
    for n, folder in enumerate("xy"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "0.tar", {"a.png": png(n), "a.txt": f"of {folder}".encode()})
    data = CropDataset(tmp_path / "*" / "0.tar", "val", 48)
    assert data.names == ["x/0/a.png", "y/0/a.png"] and data.captions == ["of x", "of y"]
    assert torch.equal(data.item(1, seed=0, sample=0)["hr"], pixels(png(1)))
    damaged = png(2)[:2000]
    shard(tmp_path / "y" / "0.tar", {"a.png": damaged, "a.txt": b"cut"})
    with pytest.raises(ImageError, match=rf"{tmp_path}/y/0\.tar: a\.png: damaged"):
        CropDataset(tmp_path / "*" / "0.tar", "val", 48).item(1, seed=0, sample=0)


def test_captions_count_only_where_they_are_asked_for(tmp_path):
    path = shard(tmp_path / "a.tar", {"0.png": png(0), "0.txt": b"caf\xe9", "1.png": png(1)})
    assert CropDataset(path, "val", 48, captions=False).captions is None
    with pytest.raises(ValueError, match=r"a\.tar: a/0\.txt is not UTF-8 text"):
        CropDataset(path, "val", 48)


def test_a_damaged_picture_of_a_shard_is_named(tmp_path):
    damaged = bytearray(png(1))
    damaged[200:] = bytes(len(damaged) - 200)
    path = shard(tmp_path / "a.tar", {"0.png": png(0), "1.png": bytes(damaged), "2.png": b"no picture"})
    with pytest.raises(ValueError, match=r"a\.tar: 2\.png is not a picture that can be read"):
        CropDataset(path, "train", 32)
    data = CropDataset(path, "val", 32, skip_broken=True)
    with pytest.raises(ImageError, match=r"a\.tar: 1\.png: damaged"):
        list(loader(data, [[1]], seed=0))
    [batch] = loader(data, [[1]], seed=0, on_error="skip")
    assert batch.names == ["a/0.png"] and "1.png" in batch.skipped[0]


def test_hugging_face_datasets_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra hub")
    names = {"train": range(3), "validation": range(3, 5)}
    parts = {}
    for split, numbers in names.items():
        rows = {"image": [{"bytes": png(i), "path": None} for i in numbers], "text": [f"picture {i}" for i in numbers]}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    data = CropDataset(tmp_path / "both", "train", 48)
    assert data.names == [f"train/{i:08d}/image" for i in range(3)] and data.captions[1] == "picture 1"
    held = data.held_out()
    assert torch.equal(held.item(1, seed=0, sample=0)["hr"], pixels(png(4))) and held.captions == [
        "picture 3",
        "picture 4",
    ]
    [batch] = loader(data, [[0, 1, 2]], seed=0, num_workers=1)
    assert sorted(batch.captions) == ["picture 0", "picture 1", "picture 2"]
    one = CropDataset(tmp_path / "one", "val", 48)
    assert torch.equal(one.item(2, seed=0, sample=0)["hr"], pixels(png(2)))
    assert CropDataset(tmp_path / "one", "train", 48).fingerprint == one.fingerprint

    def broken(place):
        raise OSError("a block\nis damaged")

    one._store._bytes = broken
    with pytest.raises(ImageError, match="one: 00000002/image: a block is damaged"):
        one.item(2, seed=0, sample=0)

    hr = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(2)]
    features = datasets.Features({"hr": datasets.Image(), "lr": datasets.Image()})
    rows = {"hr": [Image.fromarray(x) for x in hr], "lr": [Image.fromarray(x[::4, ::4]) for x in hr]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "pairs")
    pairs = CropDataset(tmp_path / "pairs", "val", 32, lr=tmp_path / "pairs")
    item = pairs.item(1, seed=0, sample=0)
    assert len(pairs) == 2 and torch.equal(item["hr"][:, ::4, ::4], item["lr"])

    with pytest.raises(ValueError, match=r"both holds no LR pictures .*; its first is called train/"):
        CropDataset(tmp_path / "both", "val", 32, lr=tmp_path / "both")
    datasets.Dataset.from_dict({"picture": [png(0)]}).save_to_disk(tmp_path / "bytes")
    with pytest.raises(ValueError, match=r"bytes has no column of the type Image .*; its columns are picture"):
        CropDataset(tmp_path / "bytes", "train", 48)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "text": ["a picture", None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "null")
    with pytest.raises(ValueError, match=r"null has no caption for 1 of 2 pictures, the first 00000001/image"):
        CropDataset(tmp_path / "null", "train", 48)

    [arrow] = (tmp_path / "one").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"one: a broken dataset \("):
        CropDataset(tmp_path / "one", "train", 48)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'gdpo-sr\[hub\]'"):
        CropDataset(tmp_path, "train", 32)
    assert folder_of_pictures.cache_file("x").parts[-3:-1] == ("gdpo", "headers")
