"""gdpo.prepare: hostile files are named, an interrupted run ends with the bytes of an uninterrupted one."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image
from skimage import data as samples

from gdpo import prepare as module
from gdpo.prepare import Settings, prepare
from tests.support import commands

SMALL = Settings(size=64, stride=64, halve=False, min_texture=0.1, val_fraction=0.3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four parts of real photos, two of which are near-duplicates."""
    folder = tmp_path_factory.mktemp("in") / "photos"
    (folder / "deep").mkdir(parents=True)
    cat, rocket, coffee = samples.chelsea(), samples.rocket(), samples.coffee()
    Image.fromarray(cat[60:220, 100:300]).save(folder / "cat.png")
    Image.fromarray(cat[60:220, 100:300]).resize((190, 152)).save(folder / "cat copy.jpg", quality=80)
    Image.fromarray(rocket[200:420, 200:400]).save(folder / "deep" / "rocket.jpg", quality=95)
    Image.fromarray(coffee[50:250, 100:300]).save(folder / "coffee2.webp", quality=95)
    return folder


def content(folder):
    """Every visible file and its bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and "/." not in str(p.relative_to(folder.parent))]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def command(*words):
    return commands.run("gdpo.prepare", *words)


def test_crops_are_what_the_manifest_says(photos, tmp_path):
    summary = prepare([photos], tmp_path / "out", SMALL)
    manifest = rows(tmp_path / "out")
    assert summary["photos"] == {"found": 4, "used": 3, "val": 1}
    assert summary["near_duplicate_photos"] == {"photos/cat.png": "photos/cat copy.jpg"}
    sources = {split: {r["source"] for r in manifest if r["file"].startswith(split)} for split in ("train", "val")}
    assert len(sources["train"]) == 2 and len(sources["val"]) == 1 and not sources["train"] & sources["val"]
    for row in manifest:
        source = photos.parent / row["source"]
        assert row["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        with Image.open(source) as photo, Image.open(tmp_path / "out" / row["file"]) as crop:
            y, x = row["y"], row["x"]
            expected = np.asarray(photo.convert("RGB"))[y : y + 64, x : x + 64]
            np.testing.assert_array_equal(np.asarray(crop), expected)
            assert row["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
        assert 0.1 <= row["texture"] <= 1 and row["scale"] == 1.0
    on_disk = {n for n in content(tmp_path / "out") if n.startswith(("train/", "val/"))}
    assert on_disk == {row["file"] for row in manifest}
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (132 * min(10, len(manifest)), 132 * -(-len(manifest) // 10))


def test_a_finished_run_again_changes_nothing(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare([photos], out, SMALL)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    monkeypatch.setattr(module, "process", None)
    assert prepare([photos], out, SMALL) == first
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}


class Killed(BaseException):
    """The end of the process: nothing after it runs."""


def test_interrupted_at_every_step_it_ends_with_the_same_bytes(photos, tmp_path, monkeypatch):
    prepare([photos], tmp_path / "straight" / "out", SMALL)
    expected = content(tmp_path / "straight" / "out")
    out = tmp_path / "killed" / "out"
    replace, save = os.replace, Image.Image.save
    left = 0

    def count(call):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(os, "replace", count(replace))
    monkeypatch.setattr(Image.Image, "save", count(save))
    kills = 0
    for step in range(1, 100):  # each attempt gets further than the last, from wherever that stopped
        left = step
        try:
            prepare([photos], out, SMALL)
            break
        except Killed:
            kills += 1
    assert kills > 10
    assert content(out) == expected
    for step in (1, 2, 3, 5, 8, 13, 21, 34, 55):  # and from the start
        shutil.rmtree(out)
        left = step
        with pytest.raises(Killed):
            prepare([photos], out, SMALL)
        left = 0
        prepare([photos], out, SMALL)
        assert content(out) == expected


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bytes(photos, tmp_path):
    many = tmp_path / "many" / "photos"
    for i in range(6):
        shutil.copytree(photos, many / f"set{i}")
    options = ["--size=48", "--stride=16", "--halve=false", "--min-texture=0", "--dedupe=-1"]
    call = [sys.executable, "-m", "gdpo.prepare", str(many), *options]
    started = time.monotonic()
    subprocess.run([*call, "--out", tmp_path / "straight" / "out"], check=True, capture_output=True)
    longest = time.monotonic() - started
    chance = random.Random(0)
    out = tmp_path / "killed" / "out"
    for i in range(20):
        process = subprocess.Popen(
            [*call, "--out", out, f"--workers={1 + i % 2}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(0.3, 1) * longest)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if i % 5 == 4:
            shutil.rmtree(out, ignore_errors=True)  # so that all phases are met, not the last alone
        time.sleep(0.1)
    assert command(many, "--out", out, *options).returncode == 0
    assert content(out) == content(tmp_path / "straight" / "out")


def test_remains_of_a_killed_write_are_cleared(photos, tmp_path):
    out = tmp_path / "out"
    prepare([photos], out, SMALL)
    remains = [out / ".manifest-abc.jsonl", out / module._WORK / ".cat-1234-xyz.json"]
    for path in remains:
        path.write_text('{"half')
    prepare([photos], out, SMALL)
    assert not any(path.exists() for path in remains)


def test_lost_and_damaged_crops_are_made_again(photos, tmp_path):
    out = tmp_path / "out"
    prepare([photos], out, SMALL)
    before = content(out)
    first, *_, last = rows(out)
    (out / first["file"]).unlink()
    (out / last["file"]).write_bytes(b"")
    (out / "train" / "stranger.png").write_bytes(b"")
    prepare([photos], out, SMALL)
    assert content(out) == before


def test_damaged_records_are_made_again_and_lost_settings_are_named(photos, tmp_path):
    out = tmp_path / "out"
    prepare([photos], out, SMALL)
    before, settings = content(out), out / ".work" / "settings.json"
    damages = [
        "",
        "[]",
        "{}",
        '{"source": "x", "bytes": 1, "mtime_ns": 1, "skipped": null, "broken": false, "crops": 3}',
    ]
    records = sorted(file for file in (out / ".work").glob("*.json") if file != settings)
    for file, damage in zip(records, damages):
        file.write_text(damage)
    (out / ".work" / "finished").unlink()
    prepare([photos], out, SMALL)
    assert content(out) == before
    (out / ".work" / "of-another-photo.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of-another-photo\.json is damaged, and of a photo that is not among these"):
        prepare([photos], out, SMALL)
    for damage in ("nope", "[]"):
        settings.write_text(damage)
        with pytest.raises(ValueError, match=r"with which settings .*out was made is lost; use another --out"):
            prepare([photos], out, SMALL)


def test_new_photos_join_and_missing_ones_are_refused(photos, tmp_path):
    folder = tmp_path / "in" / "photos"
    shutil.copytree(photos, folder)
    (folder / "cat copy.jpg").rename(tmp_path / "later.jpg")
    (folder / "broken.png").write_text("text")
    prepare([folder], tmp_path / "out", SMALL)
    (folder / "broken.png").unlink()  # what was skipped may go
    (tmp_path / "later.jpg").rename(folder / "cat copy.jpg")
    prepare([folder], tmp_path / "out", SMALL)
    prepare([folder], tmp_path / "straight" / "out", SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "straight" / "out")
    (folder / "cat copy.jpg").unlink()
    (folder / "coffee2.webp").unlink()
    with pytest.raises(ValueError, match=r"holds crops of photos that are not among these, such as photos/c"):
        prepare([folder], tmp_path / "out", SMALL)


def test_other_settings_and_other_folders_are_refused(photos, tmp_path):
    out = tmp_path / "out"
    prepare([photos], out, SMALL)
    other = Settings(size=64, stride=32, halve=False, min_texture=0.1, val_fraction=0.3)
    with pytest.raises(ValueError, match=r"was made with stride 64 \(now 32\); use these, or another --out"):
        prepare([photos], out, other)
    with pytest.raises(ValueError, match="must not lie inside one another"):
        prepare([photos], photos / "out", SMALL)
    with pytest.raises(ValueError, match="must not lie inside one another"):
        prepare([out / "train"], out, SMALL)
    with pytest.raises(ValueError, match="holds something else; choose a new or empty folder"):
        prepare([photos / "cat.png"], photos / "deep", SMALL)
    with pytest.raises(ValueError, match="no such file or folder"):
        prepare([tmp_path / "nowhere"], tmp_path / "new", SMALL)
    (tmp_path / "x" / "photos").mkdir(parents=True)
    shutil.copy(photos / "cat.png", tmp_path / "x" / "photos")
    with pytest.raises(ValueError, match=r"would both be called photos/cat\.png"):
        prepare([photos, tmp_path / "x" / "photos"], tmp_path / "new", SMALL)
    with module.Folder(out, SMALL).locked(), pytest.raises(ValueError, match=r"another gdpo\.prepare is writing"):
        prepare([photos], out, SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 8}, "size"), ({"stride": 0}, "stride"), ({"halve": 5}, "halve"), ({"min_texture": 1.5}, "min_texture"),
     ({"dedupe": 64}, "dedupe"), ({"val_fraction": 1.0}, "val_fraction")],
)  # fmt: skip
def test_settings_are_checked(photos, tmp_path, change, message):
    with pytest.raises(ValueError, match=f"{message} must be .*; got {next(iter(change.values()))}"):
        prepare([photos], tmp_path / "out", Settings(**change))
    assert not (tmp_path / "out").exists()


def hostile(folder):
    """Pictures of every awkward kind -> the ones that must be refused."""
    folder.mkdir()
    cat = samples.chelsea()[60:200, 100:260]
    good = Image.fromarray(cat)
    good.save(folder / "good.png")
    good.convert("L").save(folder / "gray.png")
    good.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(folder / "rotated.jpg", exif=exif, quality=95)
    alpha = np.full(cat.shape[:2], 255, np.uint8)
    alpha[:, :70] = 0
    Image.fromarray(np.dstack([cat, alpha])).save(folder / "alpha.png")
    import pyvips

    deep = pyvips.Image.new_from_array(cat.astype(np.uint16) * 257).copy(interpretation="rgb16")
    deep.write_to_file(str(folder / "deep.png"))
    good.resize((40, 40)).save(folder / "tiny.png")
    Image.new("RGB", (150, 150), "white").save(folder / "flat.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("a text file")
    whole = (folder / "rotated.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    good.save(folder / "moving.webp", save_all=True, append_images=[good.rotate(90)])
    (folder / "raw.nef").write_bytes(b"of a camera")
    bomb = bytearray((folder / "good.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    (folder / "bomb.png").write_bytes(bomb)
    (folder / "a folder.png").mkdir()
    (folder / ".thumbnail.png").write_text("hidden")
    (folder / "notes.txt").write_text("not a picture")
    return {"empty.png", "text.png", "cut.jpg", "raw.nef", "bomb.png"}


def test_hostile_files_are_converted_or_named(tmp_path):
    bad = hostile(tmp_path / "in")
    (tmp_path / "in" / "captions.jsonl").write_text('{"file": "good.png", "caption": "a cat"}\n')
    options = ["--size=64", "--stride=64", "--halve=false", "--dedupe=-1", "--min-texture=0.1"]
    done = command(tmp_path / "in", "--out", tmp_path / "out", *options)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name.removeprefix("in/") for name in summary["broken"]} == bad
    assert {name.removeprefix("in/") for name in summary["skipped"]} == bad | {"tiny.png", "flat.png"}
    for name, reason in summary["skipped"].items():
        assert f"skipped {name}: {reason}" in done.stderr and str(tmp_path) not in reason
    assert "40x40 is too small for crops of 64" in done.stderr and "Traceback" not in done.stderr
    assert summary["converted"] == {
        "in/gray.png": ["gray: three equal channels"],
        "in/alpha.png": ["transparent parts: left out"],
        "in/deep.png": ["16 bit: rounded to 8"],
    }
    by_source = {}
    for row in rows(tmp_path / "out"):
        by_source.setdefault(row["source"].removeprefix("in/"), []).append(row)
    assert {*by_source} == {"good.png", "gray.png", "cmyk.jpg", "rotated.jpg", "alpha.png", "deep.png", "moving.webp"}
    assert all(row["x"] >= 70 for row in by_source["alpha.png"])
    same = [{row["sha256"] for row in by_source[name]} for name in ("good.png", "deep.png")]
    assert same[0] == same[1]  # 16 bit come to the same 8
    assert max(row["y"] for row in by_source["rotated.jpg"]) == 160 - 64  # it stands upright now
    captions = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [c["file"] for c in captions] == [row["file"] for row in rows(tmp_path / "out")]
    assert {c["caption"] for c in captions if "good-" in c["file"]} == {"a cat"}
    assert "no caption for in/gray.png: left empty" in done.stderr


def test_captions_of_other_photos_are_refused(photos, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(photos, folder)
    for file, refused in (("in/coffee2.webp", True), ("coffee2.webp", False)):
        (folder / "captions.jsonl").write_text(json.dumps({"file": file, "caption": "a cat"}) + "\n")
        with pytest.raises(ValueError, match=f"captions.jsonl names {file} and others") if refused else nullcontext():
            prepare([folder], tmp_path / "out", SMALL)
    assert "a cat" in (tmp_path / "out" / "captions.jsonl").read_text()


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.png").write_text("text")
    done = command(tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == 2 and "skipped in/text.png: no" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: none of 1 photo(s) gave a crop; the reasons are above"
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        prepare([tmp_path / "void"], tmp_path / "out2", SMALL)


def test_workers_make_the_same_bytes(photos, tmp_path):
    options = ["--size=64", "--stride=64", "--halve=false", "--min-texture=0.1", "--val-fraction=0.3"]
    done = command(photos, "--out", tmp_path / "many" / "out", *options, "--workers=2")
    assert done.returncode == 0, done.stderr
    prepare([photos], tmp_path / "one" / "out", SMALL)
    assert content(tmp_path / "many" / "out") == content(tmp_path / "one" / "out")


def test_links_are_followed_and_dangling_ones_are_named(photos, tmp_path):
    prepare([photos], tmp_path / "straight", SMALL)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "photos").symlink_to(photos)
    (tmp_path / "links" / "gone.png").symlink_to("/nowhere/x.png")
    summary = prepare([tmp_path / "links"], tmp_path / "out", SMALL)
    straight = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert summary["crops"] == straight["crops"] and summary["photos"]["found"] == straight["photos"]["found"] + 1
    assert summary["broken"] == ["links/gone.png"]
    assert summary["skipped"]["links/gone.png"] == "a link to /nowhere/x.png, which is not there"


def test_a_disk_that_cannot_be_read_ends_the_run(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("gdpo.prepare.read_record", lambda file: None)
    with pytest.raises(OSError, match="cannot be read back") as caught:
        prepare([photos], tmp_path / "out", SMALL, progress=False)
    assert caught.value.filename == str(tmp_path / "out" / ".work")


def test_nothing_to_do_looks_at_no_record(photos, tmp_path, monkeypatch):
    """A finished folder is recognised by one hash; whatever changes it is seen."""
    out = tmp_path / "out"
    first = prepare([photos], out, SMALL)
    monkeypatch.setattr(module, "near_duplicates", None)
    monkeypatch.setattr(module.Folder, "record", None)
    assert prepare([photos], out, SMALL) == first
    monkeypatch.undo()
    victim = next((out / "train").iterdir())
    victim.unlink()
    assert prepare([photos], out, SMALL) == first and victim.is_file()


def test_progress_and_workers(photos, tmp_path, capfd):
    with pytest.raises(ValueError, match="workers must be at least 1; got -3"):
        prepare([photos], tmp_path / "out", SMALL, workers=-3)
    assert not (tmp_path / "out").exists()
    prepare([photos], tmp_path / "shown", SMALL)
    assert "photo/s" in capfd.readouterr().err
    prepare([photos], tmp_path / "out", SMALL, progress=False)
    assert "photo" not in capfd.readouterr().err


def test_no_progress_on_the_command_line(photos, tmp_path):
    done = command(photos, "--out", tmp_path / "out", "--size=64", "--halve=false", "--no-progress")
    assert done.returncode == 0 and "photo/s" not in done.stderr, done.stderr


def test_a_disk_that_fails_is_named_with_the_crop(photos, tmp_path, monkeypatch):
    def save(image, file, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a write raises it: without a name

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError) as caught:
        prepare([photos], tmp_path / "out", SMALL)
    assert caught.value.filename.startswith(str(tmp_path / "out")) and caught.value.filename.endswith(".png")
    monkeypatch.undo()
    assert prepare([photos], tmp_path / "out", SMALL) == prepare([photos], tmp_path / "good", SMALL)
