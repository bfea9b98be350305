"""`python -m engine.bulk` on Ray: on this machine, and on two nodes of which everything is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

pytest.importorskip("ray", reason="needs ray (extra cluster)")

from engine.bulk.claim import claimed
from engine.bulk.ledger import CLAIM, STATE, Ledger
from engine.bulk.storage import Storage
from engine.io.files import sha256
from tests.support import faulty
from tests.support.ray_cluster import Cluster

ROOT = Path(__file__).parents[2]
PICTURES = int(os.environ.get("GDPO_BULK_PICTURES", "400"))


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "engine.bulk", *map(str, arguments), "--no-progress"]
    env = os.environ | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object, **environment: str) -> tuple[int, dict, str]:
    """Exit code, summary, what came to stderr."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=400)
    return process.returncode, json.loads(out) if out else {}, err


def crops(folder: Path, count: int, bad: int) -> None:
    """Small pictures in sub-folders, `bad` of them none."""
    photo, rng = data.astronaut(), np.random.default_rng(0)
    for i in range(count):
        path = folder / f"d{i % 7}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if bad and i % (count // bad) == 1:
            path.write_bytes(b"no picture")
        else:
            y, x = rng.integers(0, 480, 2)
            Image.fromarray(photo[y : y + 24, x : x + 21]).save(path)


def expected(source: Path, out: Path) -> dict[str, str]:
    """SHA-256 of what `python -m engine.upscale` makes of each picture."""
    command = [sys.executable, "-m", "engine.upscale", source, out, "--recursive", "--no-progress", "--threads", "1"]
    subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, timeout=400)
    return hashes(out)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*.png") if path.name[0] != "."}


def test_a_folder_on_this_machine(tmp_path):
    crops(tmp_path / "in", 6, 1)
    code, summary, err = run(tmp_path / "in", tmp_path / "out", "--workers", 2)
    assert code == 1 and (summary["keys"], summary["done"], summary["failed"]) == (6, 5, 1), err
    assert "error: d1/0001.png: not a picture of a kind that is read" in err
    assert hashes(tmp_path / "out") == expected(tmp_path / "in", tmp_path / "wanted")
    code, summary, err = run(tmp_path / "in", tmp_path / "out")
    assert code == 1 and (summary["skipped"], summary["failed_before"], summary["done"]) == (5, 1, 0)
    assert "1 failed in an earlier run (--retry-failed tries them again)" in err
    code, _, err = run(tmp_path / "in", tmp_path / "out", "--seed", 1)
    assert code == 2 and "was begun with other options (seed 0 -> 1)" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "out", "options", "code", "message"),
    [
        ("absent", "out", [], 2, "absent: no such folder"),
        ("empty", "out", [], 2, "empty: no pictures there"),
        ("in", "/proc/out", [], 2, "/proc/out/.gdpo-bulk/claim.json: "),
        ("memory://x", "out", [], 2, "memory://x: is in the memory of one process alone"),
        ("s3://bucket/x" if not find_spec("s3fs") else "nowhere://x", "out", [], 2, "://"),
        ("webhdfs://127.0.0.1:1/x", "out", [], 1, "webhdfs://127.0.0.1:1/x: "),  # nobody is there
        ("in", "in", [], 2, "the pictures are in it; give another output"),
        ("in", "out", ["--address", "127.0.0.1:1"], 2, "--address 127.0.0.1:1: no Ray cluster there"),
    ],
)
def test_what_cannot_be_begun_is_one_line(tmp_path, source, out, options, code, message):
    crops(tmp_path / "in", 1, 0)
    (tmp_path / "empty").mkdir()
    places = [text if "://" in text else tmp_path / text for text in (source, out)]
    found, _, err = run(*places, *options)
    assert (found, err.count("\n"), err[:7]) == (code, 1, "error: ") and message in err, err


@pytest.mark.slow
def test_a_list_that_names_a_picture_twice(tmp_path):
    crops(tmp_path / "in", 2, 0)
    (tmp_path / "keys.csv").write_text("key\nd0/0000.png\nd1/0001.png\nd0/0000.png\n")
    code, summary, err = run(tmp_path / "keys.csv", tmp_path / "out", "--root", f"file://{tmp_path / 'in'}")
    assert (code, summary["keys"], summary["skipped"], summary["done"], summary["failed"]) == (0, 3, 1, 2, 0), err
    assert hashes(tmp_path / "out").keys() == {"d0/0000.png", "d1/0001.png"}


def test_two_runs_into_one_output(tmp_path):
    crops(tmp_path / "in", 1, 0)
    with claimed(Storage(str(tmp_path / "out")), CLAIM):
        code, _, err = run(tmp_path / "in", tmp_path / "out")
    assert code == 2 and "another run (on " in err.splitlines()[-1] and "give another output" in err


@pytest.mark.slow
@pytest.mark.skipif(faulty.missing() != "", reason=faulty.missing())
def test_a_full_disk_ends_the_run_with_one_line(tmp_path):
    crops(tmp_path / "in", 8, 0)
    out, library = tmp_path / "out", faulty.build(tmp_path)
    full = faulty.environment(library, out / "d", "full", at=12)  # of each process; the ledger has space
    code, _, err = run(tmp_path / "in", out, "--workers", 2, **full)
    assert code == 1 and "No space left on device; the run stopped, what is finished is kept" in err, err
    ours = [line for line in err.splitlines() if not line.startswith("[20")]  # Ray's core writes some with the time
    assert len(ours) == 1, err
    wanted = expected(tmp_path / "in", tmp_path / "wanted")
    assert hashes(out).items() < wanted.items()
    code, _, err = run(tmp_path / "in", out, "--workers", 2)
    assert code == 0 and hashes(out) == wanted, err


@pytest.mark.slow
def test_two_nodes_whose_workers_node_and_driver_are_killed(tmp_path):
    bad = PICTURES // 20
    crops(tmp_path / "in", PICTURES, bad)
    wanted = expected(tmp_path / "in", tmp_path / "wanted")
    assert len(wanted) == PICTURES - bad
    out = tmp_path / "out"

    def wait_for(count: int) -> None:
        until = time.monotonic() + 300
        while len(list(out.rglob("*.png"))) < count:
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < until, "no more pictures come"
            time.sleep(0.02)

    with Cluster() as cluster:
        options = ("--address", cluster.address, "--workers", 3)
        driver = start(tmp_path / "in", out, *options)
        for share in (0.1, 0.25):
            wait_for(int(share * PICTURES))
            os.kill(cluster.workers()[0], signal.SIGKILL)
        wait_for(int(0.4 * PICTURES))
        cluster.remove_node()
        wait_for(int(0.6 * PICTURES))
        driver.kill()
        driver.communicate()
        before = hashes(out)
        assert before and before.items() <= wanted.items(), "half a picture, or other bytes"
        times = {name: (out / name).stat().st_mtime_ns for name in before}
        code, summary, err = run(tmp_path / "in", out, *options)
    assert code == 1, err
    assert summary["keys"] == PICTURES and summary["skipped"] > 0, summary
    assert hashes(out) == wanted
    again = sum((out / name).stat().st_mtime_ns != before for name, before in times.items())
    assert again == 0, "a picture that was finished was written again"
    rows = Ledger(Storage(str(out))).rows()
    assert len(rows) == PICTURES
    assert {k: r["sha256"] for k, r in rows.items() if r["status"] == "done"} == wanted
    failed = {k: r["error"] for k, r in rows.items() if r["status"] == "failed"}
    assert len(failed) == bad and all("not a picture" in error for error in failed.values()), failed
    assert not list(out.rglob("*.partial*")), "a killed process left half a file"
    print(f"{PICTURES} pictures, {bad} bad: {len(before)} before the driver's death, {summary}")
    assert sorted(p.name for p in (out / STATE).iterdir()) == ["ledger", "parts", "recipe.json", "summary.json"]
