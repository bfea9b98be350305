"""`python -m gdpo.evaluate` as a user runs it, its numbers against independent ones, and what it says of bad input."""

import csv
import json
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from engine.runtime.resample import resize
from gdpo import evaluate
from gdpo.evaluation.columns import build_metrics
from gdpo.evaluation.compare import bootstrap, compare
from gdpo.evaluation.report import best_crop
from gdpo.generator import OneStepGenerator
from gdpo.model.tiny import TinyUNetConfig
from gdpo.scores.metrics import naturalness, psnr_y
from tests.support import commands

FAST = ["psnr_y", "ssim_y", "naturalness", "grid_artefact", "oversharpening"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four scenes: hr (128x128), lr (32x32), and sr: the HR slightly noisy."""
    photo = pytest.importorskip("skimage.data").astronaut()
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k, (y, x) in enumerate([(0, 128), (100, 200), (250, 30), (300, 300)]):
        hr = photo[y : y + 128, x : x + 128]
        sr = np.clip(hr + rng.normal(0, 3 + k, hr.shape), 0, 255).round().astype(np.uint8)
        for name, pixels in (("hr", hr), ("lr", resize(hr, (32, 32))), ("sr", sr)):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / name / f"scene{k}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A generator's folder of the tiny preset, stirred so that noise shows in its output."""
    generator = OneStepGenerator.tiny(TinyUNetConfig(block_out_channels=(16, 16), layers_per_block=1), seed=1)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in generator.unet.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    folder = tmp_path_factory.mktemp("models") / "stirred"
    generator.save_pretrained(folder)
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--no-progress"])
    evaluate.main()


def run_on(monkeypatch, data, out, *more):
    command(monkeypatch, "--lr", data / "lr", "--hr", data / "hr", "--out", out, "--bootstrap", 500, *more)


def rows(out):
    with open(out / "per_image.csv") as f:
        return {(r["image"], r["model"]): r for r in csv.DictReader(f)}


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255


def test_everything_is_written_and_the_numbers_are_the_metrics(monkeypatch, data, model, tmp_path):
    out = tmp_path / "out"
    run_on(
        monkeypatch, data, out, "--sr", f"noisy={data / 'sr'}", "--model", model, "--metrics", *FAST, "--seeds", 3
    )  # fmt: skip
    assert {p.name for p in out.iterdir()} == {
        "per_image.csv", "results.json", "table.md", "sheet.png", "compare.png", "pictures",
    }  # fmt: skip
    table, result = rows(out), json.loads((out / "results.json").read_text())
    assert {m for _, m in table} == {"bicubic", "noisy", "stirred", "hr"} and len(table) == 16
    for k in range(4):
        hr = pixels(data / "hr" / f"scene{k}.png")
        for name, folder in (("noisy", data / "sr"), ("stirred", out / "pictures" / "stirred")):
            x, row = pixels(folder / f"scene{k}.png"), table[f"scene{k}", name]
            assert float(row["psnr_y"]) == pytest.approx(psnr_y(x, hr).item(), abs=1e-5)
            assert float(row["naturalness"]) == pytest.approx(naturalness(x).item(), abs=1e-4)
        assert table[f"scene{k}", "hr"]["psnr_y"] == "" and float(table[f"scene{k}", "hr"]["naturalness"]) < 0
    mean = np.mean([float(table[f"scene{k}", "noisy"]["psnr_y"]) for k in range(4)])
    assert result["models"]["noisy"]["psnr_y"]["mean"] == pytest.approx(mean)
    assert result["comparison"]["a"] == "stirred" and result["comparison"]["b"] == "noisy"
    assert result["comparison"]["metrics"]["psnr_y"]["verdict"] == "worse"
    assert result["diversity"]["stirred"]["pixels"] > 0 and "noisy" not in result["diversity"]
    assert f"| noisy | {mean:.2f} |" in (out / "table.md").read_text()
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width == 4 * 256 + 3 * 6 and sheet.height > 4 * 256


def test_a_rerun_gives_the_same_values(monkeypatch, data, model, tmp_path):
    for name in ("a", "b"):
        run_on(monkeypatch, data, tmp_path / name, "--model", model, "--metrics", "psnr_y", "naturalness", "--every", 2)
    for file in ("per_image.csv", "sheet.png", "pictures/stirred/scene0.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    run_on(monkeypatch, data, tmp_path / "c", "--model", model, "--metrics", "psnr_y", "--every", 2, "--seed", 1)
    assert rows(tmp_path / "c")["scene0", "stirred"] != rows(tmp_path / "a")["scene0", "stirred"]


def test_missing_packages_and_weights_are_named(monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, "pyiqa", None)

    def no_weights(name):
        raise FileNotFoundError("asset 'vgg16' is not there; fetch it with: python -m gdpo.assets vgg16")

    monkeypatch.setattr("gdpo.assets.asset", no_weights)
    run_on(monkeypatch, data, tmp_path / "out", "--metrics", "psnr_y", "vgg", "lpips", "musiq", "fid")
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result["missing"]) == {"vgg", "lpips", "musiq", "fid"}
    assert "gdpo.assets vgg16" in result["missing"]["vgg"] and "gdpo-sr[iqa]" in result["missing"]["musiq"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not computed: lpips, musiq, fid: pyiqa cannot be imported" in table
    assert "\n- musiq: " in table and "pyiqa/musiq_koniq_ckpt-e95806b9.pth\n" in table
    assert result["missing"]["lpips"].endswith("checkpoints/alexnet-owt-7be5be79.pth")


def test_a_fid_that_fails_does_not_lose_the_other_figures(monkeypatch, data, tmp_path):
    def fid(a, b, verbose):
        raise RuntimeError("no pictures")

    fake = ModuleType("pyiqa")
    fake.create_metric = lambda name, device, as_loss: fid
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    run_on(monkeypatch, data, tmp_path / "out", "--metrics", "psnr_y", "fid")
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "RuntimeError: no pictures" in result["missing"]["fid"] and "psnr_y" in result["models"]["bicubic"]


def test_pyiqa_columns(monkeypatch, data, tmp_path):
    fake = ModuleType("pyiqa")

    def create_metric(name, device, as_loss):
        if name == "musiq":
            raise OSError("no route to host")
        if name == "fid":
            return lambda a, b, verbose: float(a != b)
        if name == "lpips":
            return lambda x, y: (x - y).abs().mean((1, 2, 3))[:, None]
        return lambda x: x.mean((1, 2, 3), keepdim=True)

    fake.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    names = ["lpips", "musiq", "maniqa-koniq", "maniqa-pipal", "fid"]
    run_on(monkeypatch, data, tmp_path / "out", "--sr", data / "sr", "--metrics", *names)
    result, table = json.loads((tmp_path / "out" / "results.json").read_text()), rows(tmp_path / "out")
    assert set(result["missing"]) == {"musiq"} and "its weights go to" in result["missing"]["musiq"]
    x, y = (pixels(data / f / "scene1.png") for f in ("sr", "hr"))
    assert float(table["scene1", "sr"]["lpips"]) == pytest.approx((x - y).abs().mean().item(), rel=1e-4)
    assert result["models"]["sr"]["maniqa"] == result["models"]["sr"]["maniqa-pipal"]  # maniqa-koniq is its old name
    assert float(table["scene1", "sr"]["maniqa-pipal"]) == pytest.approx(x.mean().item(), rel=1e-5)
    assert table["scene1", "hr"]["lpips"] == "" and result["models"]["bicubic"]["fid"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "lr", "--hr", "nothing"], "nothing is not a folder"),
        (["--lr", "lr", "--hr", "empty"], "empty holds no picture"),
        (["--lr", "three", "--hr", "hr"], "three lacks scene3; LR, SR and HR are paired by file name"),
        (["--lr", "lr", "--hr", "three"], "lr holds, beyond the HR folder, scene3"),
        (["--lr", "lr", "--hr", "hr", "--sr", "three"], "three lacks scene3"),
        (["--lr", "lr", "--hr", "hr", "--sr", "lr"], "must be 128x128 as its HR; got 32x32"),
        (["--lr", "hr", "--hr", "hr"], "(128x128) is not"),
        (["--lr", "lr", "--hr", "hr", "--sr", "sr", "--sr", "sr"], "row 'sr' is taken"),
        (["--lr", "lr", "--hr", "hr", "--sr", "hr=sr"], "row 'hr' is taken"),
        (["--lr", "lr", "--hr", "hr", "--metrics", "psnr"], "unknown metric 'psnr'; known are psnr_y, "),
        (["--lr", "lr", "--hr", "hr", "--niqe", "x.mat", "--metrics", "niqe"], "one of photos, photos-32"),
        (["--lr", "lr", "--hr", "hr", "--compare", "bicubic", "ours"], "--compare names 'ours'; rows are bicubic"),
        (["--lr", "lr", "--hr", "hr", "--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--lr", "lr", "--hr", "hr", "--seed", "-1"], "--seed must be in [0, 2^63); got -1"),
        (["--lr", "lr", "--hr", "hr", "--sheet-crop", "4096"], "--sheet-crop must be at most 1024; got 4096"),
        (["--lr", "lr", "--hr", "hr", "--device", "gpu"], "--device must be cpu, cuda or cuda:N; got 'gpu'"),
        (["--lr", "lr", "--hr", "hr", "--device", "cuda:99"], "torch sees"),
        (["--lr", "lr", "--hr", "hr", "--model", "empty"], "empty"),
        (["--lr", "lr", "--hr", "broken"], "scene0.png: "),
    ],
)
def test_bad_input_is_one_clear_line(monkeypatch, data, tmp_path, arguments, message):
    (data / "empty").mkdir(exist_ok=True)
    for folder, source in (("three", "hr"), ("broken", "hr")):
        (data / folder).mkdir(exist_ok=True)
        for k in range(3 if folder == "three" else 4):
            content = (data / source / f"scene{k}.png").read_bytes()
            (data / folder / f"scene{k}.png").write_bytes(content[: 200 if folder == "broken" else None])
    monkeypatch.chdir(data)
    metrics = [] if "--metrics" in arguments else ["--metrics", "psnr_y"]
    with pytest.raises((ValueError, OSError)) as error:
        command(monkeypatch, *arguments, *metrics, "--out", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("name", ["lr", "hr", "sr"])
def test_results_never_go_into_a_folder_of_pictures(monkeypatch, data, name):
    monkeypatch.chdir(data)
    with pytest.raises(ValueError, match="is one of the folders that are read"):
        command(monkeypatch, "--lr", "lr", "--hr", "hr", "--sr", "ours=sr", "--metrics", "psnr_y", "--out", name)


def test_exit_code_of_the_command(tmp_path):
    done = commands.run("gdpo.evaluate", "--lr", "nowhere", "--hr", "nowhere", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr == "error: nowhere is not a folder\n" and not done.stdout


# ---- the pieces ----


def test_bootstrap_interval_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = bootstrap(values, 4000, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert bootstrap(values, 4000, seed=1) == (mean, low, high)
    assert bootstrap(np.append(values, np.nan), 100, 0)[0] == pytest.approx(mean)


def test_the_interval_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(2)
    inside = 0
    for k in range(300):
        _, low, high = bootstrap(rng.normal(0, 1, 60), 400, seed=k)
        inside += low <= 0 <= high
    assert 0.90 <= inside / 300 <= 0.98


@pytest.mark.parametrize(("better", "verdict"), [(1, "better"), (-1, "worse")])
def test_paired_comparison_sees_what_unpaired_means_hide(better, verdict):
    rng = np.random.default_rng(0)
    b = rng.normal(25, 5, 50)
    a = b + rng.normal(0.3, 0.2, 50)  # far below the spread over pictures
    d = compare(a, b, better, 2000, 0)
    assert d["verdict"] == verdict and d["low"] > 0 and d["n"] == 50
    assert d["wins"] == pytest.approx((a > b).mean() if better > 0 else (a < b).mean())
    assert compare(b, b, better, 100, 0)["verdict"] == "undecided"
    assert compare(b, b, better, 100, 0)["wins"] == 0.5


def test_the_crop_is_where_the_structure_is():
    hr = np.full((96, 128, 3), 100, np.uint8)
    hr[40:60, 70:90] = np.random.default_rng(0).integers(0, 255, (20, 20, 3))
    top, left = best_crop(hr, 32)
    assert top <= 40 and top + 32 >= 60 and left <= 70 and left + 32 >= 90
    assert best_crop(hr, 500) == (0, 0)


def test_default_columns_are_known():
    columns, missing = build_metrics(["niqe", "piqe"], "photos-32", torch.device("cpu"))
    assert [c.name for c in columns] == ["niqe", "piqe"] and not missing


# ---- pictures that fail, names, borders ----


@pytest.fixture
def spoilt(data, tmp_path):
    """The scenes again: an LR picture cut, an SR picture of another size, one of 8 pixels among LR and HR."""
    root = tmp_path / "spoilt"
    for name in ("hr", "lr", "sr"):
        shutil.copytree(data / name, root / name)
    cut = root / "lr" / "scene0.png"
    cut.write_bytes(cut.read_bytes()[:100])
    Image.new("RGB", (64, 64)).save(root / "sr" / "scene1.png")
    for name, side in (("hr", 8), ("lr", 2), ("sr", 8)):
        Image.effect_noise((side, side), 50).convert("RGB").save(root / name / "tiny.png")
    return root


def test_what_fails_is_an_empty_cell_and_a_line(monkeypatch, spoilt, tmp_path, capsys):
    monkeypatch.chdir(spoilt)
    arguments = ["--lr", "lr", "--hr", "hr", "--sr", "sr", "--metrics", "psnr_y", "ssim_y", "--bootstrap", "50"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--out", str(tmp_path / "out"), "--no-progress"])
    assert evaluate.main() == 1, "the exit code says that some failed"
    table = rows(tmp_path / "out")
    assert len(table) == 5 * 3
    empty = {key for key, row in table.items() if not row["psnr_y"] and key[1] != "hr"}
    assert empty == {("scene0", "bicubic"), ("scene0", "sr"), ("scene1", "sr")}
    assert not table["tiny", "sr"]["ssim_y"] and table["tiny", "sr"]["psnr_y"], "a window of 11 does not fit"
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    expected = np.mean([float(row["psnr_y"]) for (_, m), row in table.items() if m == "sr" and row["psnr_y"]])
    assert result["models"]["sr"]["psnr_y"]["mean"] == pytest.approx(expected)
    assert result["models"]["sr"]["psnr_y"]["pictures"] == 3
    (line,) = (x for x in (tmp_path / "out" / "table.md").read_text().splitlines() if x.startswith("| sr |"))
    assert line.split("|")[2].endswith(" (3) "), "a mean over fewer pictures than beside it says so"
    errors = capsys.readouterr().err
    for line in ("lr/scene0.png", "sr/scene1.png must be 128x128 as its HR; got 64x64", "ssim_y of sr of tiny"):
        assert sum(line in shown for shown in errors.splitlines()) == 1, errors
        assert sum(line in failure for failure in result["failures"]) == 1


def test_rows_are_written_as_they_come(monkeypatch, data, tmp_path):
    seen = []

    class Gone(BaseException):
        pass

    def picture(self, name, lr, size, seed):
        seen.append(name)
        if len(seen) == 3:
            raise Gone
        return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr("gdpo.evaluation.sources.Bicubic.picture", picture)
    with pytest.raises(Gone):
        run_on(monkeypatch, data, tmp_path / "out", "--metrics", "psnr_y")
    assert {name for name, _ in rows(tmp_path / "out")} == {"scene0", "scene1"}


def test_names_by_template_and_a_border_left_out(monkeypatch, data, tmp_path):
    """RealSR's layout: HR and LR of a scene in one folder."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for k in range(4):
        for name, suffix in (("hr", "_HR"), ("lr", "_LR4"), ("sr", "_ours")):
            shutil.copy(data / name / f"scene{k}.png", mixed / f"scene{k}{suffix}.png")
    (mixed / "notes_LR.txt").write_text("no picture")
    names = ["--lr-name", "{name}_LR4", "--hr-name", "{name}_HR", "--sr-name", "{name}_ours"]
    more = ["--metrics", "psnr_rgb", "psnr_y", "naturalness", "--crop-border", "4", "--out", tmp_path / "out"]
    command(monkeypatch, "--lr", mixed, "--hr", mixed, "--sr", f"ours={mixed}", *names, *more)
    table = rows(tmp_path / "out")
    x, y = (np.array(Image.open(data / f / "scene2.png")).astype(float) for f in ("sr", "hr"))
    inner = np.s_[4:-4, 4:-4]
    expected = 10 * np.log10(255**2 / ((x - y)[inner] ** 2).mean())
    row = table["scene2", "ours"]
    assert float(row["psnr_rgb"]) == pytest.approx(expected, abs=1e-3)
    assert float(row["psnr_y"]) == pytest.approx(
        psnr_y(*(pixels(data / f / "scene2.png")[..., 4:-4, 4:-4] for f in ("sr", "hr"))).item(), abs=1e-5
    )
    assert float(row["naturalness"]) == pytest.approx(naturalness(pixels(data / "sr" / "scene2.png")).item(), abs=1e-4)
    with pytest.raises(ValueError, match=r"a template must hold \{name\} once"):
        command(monkeypatch, "--lr", mixed, "--hr", mixed, "--lr-name", "LR4", "--out", tmp_path / "none")


def test_hidden_files_folders_with_equals_and_columns_named_twice(monkeypatch, data, tmp_path):
    for name in ("hr", "lr", "sr=1"):
        shutil.copytree(data / name.partition("=")[0], tmp_path / name)
    (tmp_path / "hr" / "._scene0.png").write_bytes(b"what macOS leaves beside a picture")
    monkeypatch.chdir(tmp_path)
    options = ("--metrics", "psnr_y", "psnr_y", "--out", "out")
    command(monkeypatch, "--lr", "lr", "--hr", "hr", "--sr", tmp_path / "sr=1", "--sr", "a=sr=1", *options)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["images"] == 4 and list(result["models"]) == ["bicubic", "sr=1", "a", "hr"]
    header, *_ = (tmp_path / "out" / "per_image.csv").read_text().splitlines()
    assert header == "image,model,psnr_y"


def test_a_border_that_leaves_nothing_and_a_file_in_the_way_are_named(monkeypatch, data, tmp_path):
    options = ("--lr", data / "lr", "--hr", data / "hr", "--metrics", "psnr_y")
    with pytest.raises(ValueError, match=r"scene0: a border of 64 pixels leaves nothing of 128x128 \(--crop-border\)"):
        command(monkeypatch, *options, "--crop-border", "64", "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out must be a folder, or not exist yet; .*file is a file"):
        command(monkeypatch, *options, "--out", tmp_path / "file")
