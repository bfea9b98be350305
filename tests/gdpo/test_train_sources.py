"""Training on real pairs, shards and several folders at once: a run's invariants hold, and its sheets show pairs."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gdpo.train.config import NAOSDConfig
from gdpo.train.options import DataConfig, PairsConfig, ValidationConfig
from tests.support.training import GDPO, NAOSD, train, train_here


@pytest.fixture(scope="module")
def world(crops, tmp_path_factory) -> Path:
    """Pairs of the scales 4 and 1, two shards with a damaged picture, and a folder."""
    root = tmp_path_factory.mktemp("sources")
    pictures = sorted(crops.glob("*.png"))
    for i, file in enumerate(pictures[:6]):
        picture = Image.open(file)
        for name, part in (("HR", picture), ("LR", picture.resize((24, 24)) if i % 2 else picture.resize((96, 96)))):
            (root / name).mkdir(exist_ok=True)
            part.save(root / name / f"{i}.png")
    for n in range(2):
        with tarfile.open(root / f"s-{n}.tar", "w") as tar:
            for file in pictures[6 + 3 * n : 9 + 3 * n]:
                tar.add(file, file.name)
    shard = bytearray((root / "s-1.tar").read_bytes())
    start = shard.index(b"IDAT") + 1000
    shard[start : start + 3000] = bytes(3000)
    (root / "s-1.tar").write_bytes(shard)
    (root / "folder").mkdir()
    for file in pictures[12:]:
        shutil.copy(file, root / "folder")
    return root


def options(world: Path, out: Path, *more: str) -> list[str]:
    return [
        *NAOSD,
        f"--data.folder={json.dumps([f'{world}/folder', f'{world}/s-{{0..1}}.tar'])}",
        "--data.weights=[1,2]",
        f"--data.pairs.lr={world}/LR",
        f"--data.pairs.hr={world}/HR",
        "--data.pairs.ratio=0.4",
        "--data.on_error=skip",
        "--train_batch_size=4",
        "--max_train_steps=8",
        f"--output_dir={out}",
        *more,
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "step_time"} for row in lines]


@pytest.mark.slow
def test_resume_and_two_processes_equal_a_straight_run(world, tmp_path, monkeypatch):
    straight, stopped, two = (tmp_path / name for name in ("straight", "stopped", "two"))
    train_here(monkeypatch, *options(world, straight))
    assert sum(r.get("skipped", 0) for r in rows(straight)) >= 1
    train_here(monkeypatch, *options(world, stopped, "--checkpointing_steps=1", "--checkpoints_total_limit=9"))
    shutil.rmtree(stopped / "model")
    for folder in sorted(stopped.glob("checkpoint-*"))[3:]:
        shutil.rmtree(folder)
    moved = tmp_path / "moved"  # a resumed run may find the same pictures elsewhere
    shutil.copytree(world, moved)
    train_here(monkeypatch, *options(moved, stopped, "--resume_from_checkpoint=latest"))
    assert rows(stopped) == rows(straight)
    a, b = weights(straight), weights(stopped)
    assert all(torch.equal(a[k], b[k]) for k in a)
    train(*options(world, two, "--train_batch_size=2"), processes=2)
    c = weights(two)
    apart = sum(float((a[k].double() - c[k]).square().sum()) for k in a) ** 0.5
    assert apart < 2e-5 * sum(float(v.double().square().sum()) for v in a.values()) ** 0.5
    skipped = [[r["skipped"] for r in rows(run) if "skipped" in r] for run in (straight, two)]  # others: held out
    assert sum(skipped[0]) >= 1 and skipped[1] == pytest.approx(skipped[0])


def test_gdpo_learns_from_pairs_alone_and_shows_them(world, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    common = [f"--data.pairs.lr={world}/LR", f"--data.pairs.hr={world}/HR", "--data.folder=/nowhere"]
    arguments = [*GDPO, *common, f"--model.pretrained={trained}", f"--output_dir={out}", "--max_train_steps=1"]
    train_here(monkeypatch, *arguments, "--data.pairs.ratio=1")  # so that the folder is of no concern
    sheet = np.asarray(Image.open(out / "sheets" / "step-0000001.png")).astype(int)
    lr = Image.open(world / "LR" / "0.png").crop((16, 16, 80, 80))  # of the HR's size: shown as it is
    assert np.abs(sheet[18 : 18 + 64, :64] - np.asarray(lr)).max() <= 1


def test_sheets_may_show_other_pairs(world, crops, tmp_path, monkeypatch):
    out = tmp_path / "run"
    validation = [f"--data.validation.lr={world}/LR", f"--data.validation.hr={world}/HR"]
    train_here(monkeypatch, *NAOSD, f"--data.folder={crops}", *validation, f"--output_dir={out}", "--max_train_steps=1")
    sheet = np.asarray(Image.open(out / "sheets" / "step-0000001.png")).astype(int)
    hr = Image.open(world / "HR" / "3.png").crop((16, 16, 80, 80))  # the second of two, spread over six
    assert np.array_equal(sheet[18 + 68 : 18 + 68 + 64, -64:], np.asarray(hr))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(pairs=PairsConfig(lr="x")), "data.pairs must be both lr and hr, or neither"),
        (DataConfig(pairs=PairsConfig(lr=["a", "b"], hr="c")), "data.pairs must be as many lr as hr; got 2 and 1"),
        (DataConfig(pairs=PairsConfig(ratio=0)), "data.pairs.ratio must be above 0, at most 1; got 0"),
        (DataConfig(["a", "b"], weights=[1]), r"data.weights must be a number above 0 for each of 2; got \[1\]"),
        (DataConfig(weights=[0]), "data.weights must be a number above 0 for each of 1"),
        (DataConfig(weights=[-1]), "data.weights must be a number above 0 for each of 1"),
        (DataConfig(["a", "b"], weights=[1, float("nan")]), r"data.weights must be finite; got \[1, nan\]"),
        (DataConfig(["a", "b"], weights=[1e308, 1e308]), "data.weights must be a number above 0 for each of 2"),
        (DataConfig(pairs=PairsConfig(ratio=1.5)), "data.pairs.ratio must be above 0, at most 1; got 1.5"),
        (DataConfig(pairs=PairsConfig(ratio=float("nan"))), "data.pairs.ratio must be finite; got nan"),
        (DataConfig(validation=ValidationConfig(hr="x")), "data.validation must be both lr and hr"),
    ],
)
def test_wrong_options_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        NAOSDConfig(data=data).validate()
