"""`python -m engine.upscale` over outputs that are there already: finished, stale, or somebody else's."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.io import journal
from engine.io.images import read_image
from engine.runtime.upscaler import Upscaler
from tests.support.pictures import save


def command(*arguments):
    return [sys.executable, "-m", "engine.upscale", *map(str, arguments)]


@pytest.fixture
def made(run, photo, tmp_path):
    """(input, output) of a first run."""
    source, out = save(tmp_path / "in" / "a.png", photo[:16, :16]), tmp_path / "out" / "a.png"
    assert run(source, out)[0] == 0
    return source, out


def row(stdout: str) -> dict:
    return json.loads(stdout.splitlines()[-1])


def test_an_input_that_was_replaced_is_made_again_and_that_is_said(run, made, photo):
    source, out = made
    before = out.read_bytes()
    save(source, photo[40:56, 40:56])
    code, stdout, err = run(source, out, "--json")
    assert code == 0 and row(stdout)["status"] == "written" and row(stdout)["again"] == "the input has changed"
    assert f"{out}: made again: the input has changed" in err and out.read_bytes() != before
    assert "1 skipped" in run(source, out)[2]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--seed", "9"], "seed 0 -> 9"),
        (["--scale", "2"], "scale 4.0 -> 2.0"),
        (["--longest", "40"], "longest none -> 40, scale 4.0 -> none"),
        (["--color", "adain"], "color wavelet -> adain"),
        (["--tile", "32"], "tile 512 -> 128"),
        (["--wrap"], "wrap none -> both"),
        (["--strip-metadata"], "strip_metadata False -> True"),
        (["--background", "white"], "background none -> white"),
    ],
)
def test_other_options_make_it_again(run, made, options, reason):
    source, out = made
    code, stdout, err = run(source, out, *options, "--json")
    assert code == 0 and row(stdout)["again"] == f"other options: {reason}", err
    assert row(run(source, out, *options, "--json")[1])["status"] == "skipped"


def test_another_model_makes_it_again_and_quality_only_where_it_matters(run, made, tiny_split_engine, tmp_path):
    source, out = made
    assert "1 skipped" in run(source, out, "--quality", "50")[2]  # a PNG has none
    assert run(source, tmp_path / "o.jpg")[0] == 0
    assert "quality 95 -> 50" in run(source, tmp_path / "o.jpg", "--quality", "50")[2]
    _, _, err = run(source, out, "--no-progress", "--model", tiny_split_engine, model=False)
    assert "made again: other options: model " in err


def test_what_somebody_edited_is_not_replaced_unless_asked(run, made, photo):
    source, out = made
    save(out, photo[:64, :64])
    edited = out.read_bytes()
    code, _, err = run(source, out)
    assert code == 1 and "has changed since it was made; --overwrite replaces it" in err and out.read_bytes() == edited
    code, _, err = run(source, out, "--on-clash", "rename")
    beside = out.with_name("a-2.png")
    assert code == 0 and beside.is_file() and out.read_bytes() == edited, err
    assert "1 skipped" in run(source, out, "--on-clash", "rename")[2] and not out.with_name("a-3.png").exists()
    assert run(source, out, "--overwrite")[0] == 0 and out.read_bytes() == beside.read_bytes()


def test_a_picture_of_another_folder_does_not_replace_the_result_of_its_namesake(run, made, photo, tmp_path):
    source, out = made
    other = save(tmp_path / "other" / "a.png", photo[30:46, 30:46])
    code, _, err = run(other, out.parent)
    assert code == 1 and "was made from another picture" in err
    assert run(other, out.parent, "--on-clash", "rename")[0] == 0 and (out.parent / "a-2.png").is_file()
    assert "1 skipped" in run(source, out.parent)[2]


def test_sizes_that_people_ask_for(run, photo, tmp_path):
    source = save(tmp_path / "in.png", photo[:30, :41])

    def size(*options) -> tuple[int, ...]:
        code, _, err = run(source, tmp_path / "o.png", *options)
        assert code == 0, err
        return read_image(tmp_path / "o.png").pixels.shape[:2]

    assert size("--width", "100") == (73, 100)
    assert size("--height", "99") == (99, 135)
    assert size("--longest", "150") == (110, 150)
    assert size("--width", "100", "--height", "50") == (50, 68)  # within both
    assert size("--width", "17") == (12, 17)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--scale", "2", "--width", "10"], "scale and width contradict each other"),
        (["--longest", "2", "--width", "10"], "longest goes with neither width nor height"),
        (["--longest", "0"], "longest must be at least 1 pixel; got 0"),
        (["--width", "-1"], "width must be at least 1 pixel; got -1"),
        (["--background", "bluish"], "background must be a colour such as white"),
    ],
)
def test_sizes_and_colours_that_cannot_be(run, photo, tmp_path, options, message):
    source = save(tmp_path / "in.png", photo[:8, :8])
    code, _, err = run(source, tmp_path / "o.png", *options)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_sides_that_ask_for_too_much_are_named(run, photo, tmp_path):
    source = save(tmp_path / "in.png", photo[:8, :10])
    code, _, err = run(source, tmp_path / "o.png", "--width", "100000")
    assert code == 1 and "10x8 would be made 1e+04 times as large; 0.05 to 64 times is done" in err


def test_a_side_is_met_exactly_whatever_the_input(tiny_engine):
    from engine.runtime.upscaler import output_size
    from engine.settings import Settings

    random = np.random.default_rng(0)
    for height, width, wanted in random.integers(1, 5000, (2000, 3)).tolist():
        for name, side in (("width", width), ("height", height), ("longest", max(height, width))):
            if 0.05 <= wanted / side <= 64:
                factor = Settings(**{name: wanted}).factor(height, width)
                size = (round(height * factor), round(width * factor))
                assert wanted in size and (output_size(1, 1, factor) or True)


def test_standard_input_and_output(tiny_engine, photo, tmp_path):
    source = save(tmp_path / "in.png", photo[:16, :20])
    model = ("--model", tiny_engine)
    done = subprocess.run(command("in.png", "-", *model), cwd=tmp_path, capture_output=True, env=here(), timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b"\x89PNG") and os.listdir(tmp_path) == ["in.png"]
    piped = subprocess.run(
        command("-", "-", "-f", "png", *model), input=source.read_bytes(), capture_output=True, env=here(), timeout=60
    )
    assert piped.stdout == done.stdout
    subprocess.run(command("-", tmp_path / "o.png", *model), input=source.read_bytes(), check=True, env=here())
    assert (tmp_path / "o.png").read_bytes() == done.stdout
    bad = subprocess.run(command("-", "-", *model), input=b"rubbish", capture_output=True, env=here(), timeout=60)
    assert bad.returncode == 1 and bad.stdout == b"" and b"error: standard input: not a" in bad.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["in.png", "in.png", "-"], "standard output takes one picture"),
        ([".", "-"], "standard output takes one picture"),
        (["in.png", "-", "--json"], "output - and --json would both write to standard output"),
    ],
)
def test_standard_output_takes_one_picture_and_nothing_else(run, photo, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save(Path("in.png"), photo[:8, :8])
    code, stdout, err = run(*arguments)
    assert (code, stdout) == (2, "") and err.count("\n") == 1 and message in err


def here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_events_for_a_front_end(run, photo, tmp_path):
    for name, side in (("a.png", 16), ("b.png", 160)):
        save(tmp_path / "in" / name, photo[:side, :side])
    (tmp_path / "in" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    code, stdout, _ = run(tmp_path / "in", tmp_path / "out", "--tile", "64", "--json", model=True)
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [r["event"] for r in rows] == ["picture"] * 3  # --no-progress: results alone
    assert [r["status"] for r in rows] == ["written", "written", "failed"] and code == 1


def test_progress_events_come_with_json(tiny_engine, photo, tmp_path):
    save(tmp_path / "in" / "a.png", photo[:160, :160])
    line = command(tmp_path / "in", tmp_path / "out", "--tile", 64, "--json", "--model", tiny_engine)
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    rows = [json.loads(text) for text in done.stdout.splitlines()]
    last = rows[-2]
    assert rows[-1]["event"] == "picture" and rows[-1]["status"] == "written"
    assert {r["event"] for r in rows[:-1]} == {"progress"} and rows[0]["tile"] == 1 < last["tiles"] == last["tile"]
    keys = {"event", "input", "output", "status", "picture", "pictures", "tile", "tiles", "fraction", "elapsed", "eta"}
    assert set(last) == keys and last["fraction"] == 1.0 and last["eta"] == 0.0 and rows[0]["eta"] > 0


def test_a_killed_run_is_continued_and_leaves_nothing(tiny_engine, photo, tmp_path):
    """SIGKILL at any moment: the next run skips what is whole, makes the rest, and cleans up."""
    for i in range(6):
        save(tmp_path / "in" / f"{i}.png", photo[32 * i : 32 * i + 32, :64])
    out = tmp_path / "out"
    line = command(tmp_path / "in", out, "--model", tiny_engine, "--threads", 1)
    for pictures in (1, 3):
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        while len(list(out.glob("[0-9].png"))) < pictures:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    (out / ".gdpo-sr-00000000.partial.png").write_bytes(b"half")
    os.utime(out / ".gdpo-sr-00000000.partial.png", (1, 1))
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "skipped" in done.stderr and "made again" not in done.stderr, done.stderr
    assert sorted(os.listdir(out)) == sorted([journal.NAME, *(f"{i}.png" for i in range(6))])


def test_two_runs_over_one_folder(tiny_engine, photo, tmp_path):
    for i in range(8):
        save(tmp_path / "in" / f"{i}.png", photo[32 * i : 32 * i + 32, :64])
    line = command(tmp_path / "in", tmp_path / "out", "--model", tiny_engine, "--threads", 1, "--json")
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [p.returncode for p in both] == [0, 0], results
    again = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert "8 skipped" in again.stderr and "made again" not in again.stderr
    assert len(os.listdir(tmp_path / "out")) == 9


@pytest.mark.parametrize("failure", ["bad_alloc", "MemoryError"])
def test_where_memory_lacks_a_smaller_tile_is_named(run, photo, tmp_path, monkeypatch, failure):
    error = MemoryError() if failure == "MemoryError" else RuntimeError("std::bad_alloc")

    def upscale(*arguments, **more):
        raise error

    monkeypatch.setattr(Upscaler, "upscale", upscale)
    source = save(tmp_path / "in.png", photo[:16, :16])
    for tile, advice in (("0", "try --tile 64"), ("128", "try --tile 64"), ("16", "too large for this machine")):
        code, _, err = run(source, tmp_path / "o.png", "--tile", tile)
        assert code == 1 and "not enough memory" in err and advice in err


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&-", "| true", "> /dev/full"])
def test_closed_and_full_streams_cost_no_picture(tiny_engine, photo, tmp_path, streams):
    save(tmp_path / "in.png", photo[:16, :16])
    text = f'"$0" -m engine.upscale in.png o.png --json --model {tiny_engine} {streams}'
    done = subprocess.run(["sh", "-c", text, sys.executable], cwd=tmp_path, capture_output=True, env=here(), timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert read_image(tmp_path / "o.png").pixels.shape == (64, 64, 3)
    assert sorted(os.listdir(tmp_path)) == [journal.NAME, "in.png", "o.png"]


@pytest.mark.parametrize(
    "limits", ["ulimit -n 64;", "LANG=C LC_ALL=C", "unset HOME;", "HOME=/proc/nowhere", "ulimit -v 150000;"]
)
def test_poor_surroundings_are_one_line_or_success(photo, tmp_path, limits):
    save(tmp_path / "in.png", photo[:16, :16])
    text = f'{limits} "$0" -m engine.upscale in.png o.png'
    done = subprocess.run(["sh", "-c", text, sys.executable], cwd=tmp_path, capture_output=True, env=here(), timeout=60)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0 or b"error: " in done.stderr.splitlines()[-1]
    assert done.returncode == 0 or "ulimit -v" in limits
