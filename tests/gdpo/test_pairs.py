"""Real pairs of LR and HR pictures: which belong together, what a crop of both shows, and several sources in a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.io.images import ImageError
from gdpo.photos.dataset import CropDataset, loader
from gdpo.photos.mixture import HeldOut, Mixture


def draw(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A picture of blocks of 4x4 equal pixels, so that its quarter is exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width]).save(path)
    return path


def shrink(hr: Path, lr: Path, scale: int) -> None:
    """The LR of a picture: one pixel of each block."""
    lr.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(hr))
    Image.fromarray(pixels[: len(pixels) // scale * scale : scale, : pixels.shape[1] // scale * scale : scale]).save(lr)


def pairs(root: Path, names: list[tuple[str, str]], scale: int = 4) -> Path:
    for i, (hr, lr) in enumerate(names):
        shrink(draw(root / hr, 64 + 8 * i, 80, i), root / lr, scale)
    return root


NAMES = {
    "as they are": ("HR", "LR", [("HR/a/1.png", "LR/a/1.png"), ("HR/2.png", "LR/2.png")]),
    "DIV2K": ("HR", "LR/X4", [("HR/0001.png", "LR/X4/0001x4.png"), ("HR/0002.png", "LR/X4/0002x4.png")]),
    "RealSR, one folder": (".", ".", [("Canon_1_HR.png", "Canon_1_LR4.png"), ("Canon_2_HR.png", "Canon_2_LR4.png")]),
    "a folder of both": (".", ".", [("GT/1.png", "LQ/1.png"), ("GT/2.png", "LQ/2.png")]),
    "splits": ("HR", "LR", [("HR/train/1_gt.png", "LR/train/1_lq.png"), ("HR/val/2_gt.png", "LR/val/2_lq.png")]),
}


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("kind", NAMES)
def test_pairs_are_matched_by_name_and_cut_at_the_same_place(kind, scale, tmp_path):
    hr, lr, names = NAMES[kind]
    pairs(tmp_path, names, scale)
    data = CropDataset(tmp_path / hr, "train", 32, lr=tmp_path / lr)
    assert len(data) == (1 if kind == "splits" else 2)
    held = data.held_out()
    for sample in range(6):
        for part in (data, held):
            item = part.item(sample % len(part), seed=3, sample=sample)
            assert item["hr"].shape == (3, 32, 32) and item["lr"].shape == (3, 32 // scale, 32 // scale)
            # Blocks of 4x4 pixels: every first one of a block is the LR, whichever way up, if both show the same.
            corners = [item["hr"].flip(flip)[:, ::scale, ::scale].flip(flip) for flip in ((), (1,), (2,), (1, 2))]
            assert any(torch.equal(item["lr"], corner) for corner in corners)
    assert held.names == (["val/2_gt.png"] if kind == "splits" else data.names)


def test_the_loader_gives_the_lr_of_pairs_alone(tmp_path):
    pairs(tmp_path, [("HR/1.png", "LR/1.png")])
    real = CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR")
    synthetic = CropDataset(tmp_path / "HR", "train", 32)
    mixed = Mixture([real, synthetic], [1, 3])
    for workers in (0, 2):
        [batch] = loader(mixed, [[0, 1, 2, 3]], seed=0, num_workers=workers)
        assert list(batch.real) == [3] and batch.real[3].shape == (3, 8, 8) and batch.hr.shape == (4, 3, 32, 32)
    [alone] = loader(mixed, [[3]], seed=0)
    assert torch.equal(alone.real[0], batch.real[3]) and torch.equal(alone.hr[0], batch.hr[3])
    assert not next(iter(loader(synthetic, [[0, 1]], seed=0))).real


def test_left_over_rows_are_cut_and_other_sizes_are_refused(tmp_path):
    pairs(tmp_path, [("HR/1.png", "LR/1.png")])
    draw(tmp_path / "HR/1.png", 67, 81)  # LR 16x20: as MATLAB's modcrop leaves it
    assert len(CropDataset(tmp_path / "HR", "train", 64, lr=tmp_path / "LR")) == 1
    shrink(draw(tmp_path / "HR/2.png", 64, 64), tmp_path / "LR/2.png", 4)
    for width, height in ((80, 64), (68, 64), (60, 64), (12, 12), (580, 580)):
        draw(tmp_path / "HR/2.png", width, height)
        line = rf"HR/2\.png is {width}x{height} and its LR .*LR/2\.png 16x16: it must be 1 to 8 times as large"
        with pytest.raises(ValueError, match=rf"{line}.*; take such pairs away, or --data\.on_error skip"):
            CropDataset(tmp_path / "HR", "train", 12, lr=tmp_path / "LR")
    data = CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR", skip_broken=True)
    assert data.names == ["1.png"] and "HR/2.png is 580x580" in data.notes[0]
    with pytest.raises(ValueError, match=r"crop_size must be a multiple of 4: .*1\.png is 4 times.* got 30"):
        CropDataset(tmp_path / "HR", "train", 30, lr=tmp_path / "LR", skip_broken=True)
    draw(tmp_path / "HR/1.png", 90, 80)  # changed under a run
    with pytest.raises(ImageError, match=r"HR/1\.png: its size is not that of its LR, .*LR/1\.png, magnified"):
        list(loader(data, [[0]], seed=0))


def test_missing_partners_are_counted_and_left_out_when_asked(tmp_path):
    pairs(tmp_path, [(f"HR/{i}.png", f"LR/{i}x4.png") for i in range(4)])
    (tmp_path / "LR/1x4.png").unlink()
    (tmp_path / "LR/3x4.png").unlink()
    with pytest.raises(ValueError, match=r"HR/1\.png has no LR picture in .*LR, nor have 1 more of 4; .*on_error skip"):
        CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR")
    data = CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR", skip_broken=True)
    assert data.names == ["0.png", "2.png"] and "1.png has no LR picture" in data.notes[0]
    for i in (1, 2, 3):
        (tmp_path / f"HR/{i}.png").unlink()
    with pytest.raises(ValueError, match=r"LR/2x4\.png has no HR picture in"):
        CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR")
    shutil.copy(tmp_path / "LR/0x4.png", tmp_path / "LR/0_x4.png")
    with pytest.raises(ValueError, match=r"0x4\.png and .*0_x4\.png|0_x4\.png and .*0x4\.png"):
        CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "LR")
    with pytest.raises(ValueError, match="holds no LR pictures by their names"):
        CropDataset(tmp_path / "HR", "train", 32, lr=tmp_path / "HR")


def test_list_files_name_pictures_and_pairs_line_by_line(tmp_path):
    pairs(tmp_path, [("a/1.png", "b/x.png"), ("a/2.png", "b/y.png"), ("a/3.png", "b/z.png")])
    (tmp_path / "hr.txt").write_text("# chosen by hand\na/3.png (80,80,3)\n\na/1.png\n")
    (tmp_path / "lr.txt").write_text(f"b/z.png\n{tmp_path}/b/x.png\n")
    assert CropDataset(tmp_path / "hr.txt", "train", 32).names == ["a/3.png", "a/1.png"]
    data = CropDataset(tmp_path / "hr.txt", "val", 80, lr=tmp_path / "lr.txt", skip_small=True)
    item = data.item(0, seed=0, sample=0)
    assert item["name"] == "a/3.png" and torch.equal(item["hr"][:, ::4, ::4], item["lr"])
    (tmp_path / "lr.txt").write_text("b/z.png\n")
    with pytest.raises(
        ValueError, match=r"hr\.txt lists 2 pictures and .*lr\.txt 1: a line of one belongs to the same"
    ):
        CropDataset(tmp_path / "hr.txt", "train", 32, lr=tmp_path / "lr.txt")
    (tmp_path / "hr.txt").write_text("a/1.png\na/9.png\n")
    with pytest.raises(ValueError, match=r"hr\.txt, line 2: 'a/9\.png' is not there; a line is a picture's path"):
        CropDataset(tmp_path / "hr.txt", "train", 32)
    (tmp_path / "hr.txt").write_text("# none\n")
    with pytest.raises(ValueError, match=r"hr\.txt lists no pictures"):
        CropDataset(tmp_path / "hr.txt", "train", 32)


def test_lists_as_other_programs_write_them(tmp_path):
    """A byte order mark, Windows' line ends, lines that come twice (each with its own LR), absolute paths."""
    pairs(tmp_path, [("a/1.png", "b/x.png"), ("a/2.png", "b/y.png")])
    shrink(tmp_path / "a/1.png", tmp_path / "b/half.png", 2)
    hr, lr = tmp_path / "hr.txt", tmp_path / "lr.txt"
    hr.write_bytes(f"\ufeffa/1.png\r\n{tmp_path}/a/2.png\r\na/1.png\r\n".encode())
    lr.write_bytes("\ufeffb/x.png\r\nb/y.png\r\nb/half.png\r\n".encode())
    data = CropDataset(hr, "val", 32, lr=lr)
    assert data.names == ["a/1.png", f"{tmp_path}/a/2.png", "a/1.png"]
    for index, scale in enumerate((4, 4, 2)):
        item = data.item(index, seed=0, sample=0)
        assert torch.equal(item["hr"][:, ::scale, ::scale], item["lr"])
    hr.write_bytes("a/1.png\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"hr\.txt is not UTF-8 text"):
        CropDataset(hr, "train", 32)


def test_what_a_list_names_in_vain_is_left_out_when_asked(tmp_path):
    """Line by line, so that the other pairs stay pairs."""
    pairs(tmp_path, [("a/1.png", "b/x.png"), ("a/2.png", "b/y.png"), ("a/3.png", "b/z.png")])
    hr, lr = tmp_path / "hr.txt", tmp_path / "lr.txt"
    hr.write_text("a/1.png\na/2.png\na/3.png\n")
    lr.write_text("b/lost\0.png\nb/y.png\nb/z.png\n")
    with pytest.raises(ValueError, match=r"lr\.txt, line 1: 'b/lost\\x00\.png' is not there"):
        CropDataset(hr, "val", 32, lr=lr)
    data = CropDataset(hr, "val", 32, lr=lr, skip_broken=True)
    assert data.names == ["a/2.png", "a/3.png"] and "lr.txt, line 1" in data.notes[0]
    for index in (0, 1):
        item = data.item(index, seed=0, sample=0)
        assert torch.equal(item["hr"][:, ::4, ::4], item["lr"])
    hr.write_text("a/9.png\n")
    with pytest.raises(ValueError, match=r"hr\.txt, line 1: 'a/9\.png' is not there"):
        CropDataset(hr, "train", 32, skip_broken=True)


def test_a_mixture_keeps_its_shares_and_every_picture_comes_once_an_epoch(tmp_path):
    for name, count in (("a", 3), ("b", 5), ("c", 2)):
        for i in range(count):
            draw(tmp_path / name / f"{i}.png", 32, 32, i)
    parts = [CropDataset(tmp_path / name, "train", 32) for name in "abc"]
    mixture = Mixture(parts, [0.5, 0.3, 0.2])
    seen = [mixture.part_of(sample) for sample in range(1000)]
    for share, part in zip((0.5, 0.3, 0.2), parts):
        numbers = [number for found, number in seen if found is part]
        assert numbers == list(range(len(numbers)))  # its own numbers, without gap
        for n in (10, 37, 100, 1000):
            assert abs(sum(found is part for found, _ in seen[:n]) - share * n) <= 2
    assert len(mixture) == 10
    held = HeldOut([part.held_out() for part in parts])
    chosen = [held.part_of(sample) for sample in held.spread(5)]
    assert [(part.names[n], part.folder.name) for part, n in chosen] == [
        ("0.png", "a"), ("1.png", "a"), ("0.png", "b"), ("2.png", "b"), ("0.png", "c"),
    ]  # fmt: skip
    assert len(held.spread(2)) == 2 and len(held.spread(100)) == 10


def test_a_share_may_be_as_small_as_one_likes(tmp_path):
    for name in "ab":
        draw(tmp_path / name / "0.png", 32, 32)
    parts = [CropDataset(tmp_path / name, "train", 32) for name in "ab"]
    for shares in ([1, 1e-9], [1e-9, 1]):
        mixture = Mixture(parts, shares)
        rare = parts[shares.index(1e-9)]
        assert sum(mixture.part_of(sample)[0] is rare for sample in range(1000)) <= 1
        assert sum(mixture.part_of(10**9 + k)[0] is rare for k in range(-9, 9)) == 1
