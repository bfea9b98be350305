"""The short form of `make attack`, and that a failure of the product is seen by it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.attack import harness
from tests.attack.harness import Log, Section, attack, run_chunk
from tests.attack.planted import FAULTS
from tests.support import faulty

ROOT = Path(__file__).resolve().parents[2]
ALL = ["pictures", "bombs", "manifests", "graphs", "disk", "disk-strange", "kill-upscale", "kill-naosd", "kill-gdpo",
       "signals", "archives"]  # fmt: skip
SHORT = {"pictures": 60, "bombs": 40, "manifests": 40, "graphs": 25, "disk": 12, "disk-strange": 5}


def tried(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.attack", "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=550)


@pytest.mark.parametrize("name, tries", SHORT.items())
def test_nothing_breaks(name, tries, tmp_path):
    if name.startswith("disk") and faulty.missing():
        pytest.skip(faulty.missing())
    done = tried(tmp_path, "--only", name, "--tries", str(tries), "--minutes", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {tries} | 0 |" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in ALL if name not in SHORT])
def test_nothing_breaks_in_whole_commands(name, tmp_path):
    done = tried(tmp_path, "--only", name, "--tries", "2", "--minutes", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 | 0 |" in done.stdout


def test_an_unknown_section_is_named_with_those_that_there_are(tmp_path):
    done = tried(tmp_path, "--only", "everything")
    assert done.returncode == 2 and "pictures, bombs" in done.stderr and "got everything" in done.stderr


@pytest.mark.parametrize("number, fault", list(enumerate(FAULTS, 1)))
def test_a_planted_fault_has_its_line_and_its_test(number, fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.right) == 1
    compile(text.replace(fault.right, fault.wrong), fault.file, "exec")  # it fails for no other reason
    file, name = fault.test.split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


# ---- the harness itself


def failing(kind: str):
    def trial(number: int) -> None:
        if number != 2:
            return
        if kind == "crash":
            os.abort()
        if kind == "exit":
            os._exit(0)
        if kind == "hang":
            time.sleep(60)
        if kind == "slow":
            end = time.process_time() + 0.6
            while time.process_time() < end:
                pass
        if kind == "memory":
            assert b"x" * (300 << 20)
        if kind == "wrong":
            raise AssertionError("torn")

    return lambda work: trial


@pytest.mark.parametrize(
    "kind, message",
    [
        ("crash", "ended by signal 6"),
        ("exit", "exit 0"),
        ("hang", "no answer in 2 s"),
        ("slow", "took 0."),
        ("memory", "MiB"),
        ("wrong", "torn"),
    ],
)
def test_whatever_a_trial_does_is_a_failure_and_the_next_ones_run(tmp_path, monkeypatch, kind, message):
    if kind == "hang":
        monkeypatch.setattr(harness, "PATIENCE", (2, 0))
    section = Section(kind, kind, 5, failing(kind), chunk=5, seconds=0.4 if kind == "slow" else 10, mib=200)
    row = run_chunk(section, section.start(tmp_path), 0, 5)
    assert row["tries"] == 5 and len(row["failures"]) == 1
    assert row["failures"][0].startswith(f"{kind} 2: ") and message in row["failures"][0]


def test_an_attack_goes_on_where_it_stopped_and_starts_again_at_another_commit(tmp_path):
    seen = tmp_path / "seen"

    def start(work: Path):
        def trial(number: int) -> None:
            with open(seen, "a") as f:
                f.write(f"{number} ")

        return trial

    section = Section("a", "a", 10, start, chunk=3)
    log = Log(tmp_path / "out", "one")
    attack([section], log, tmp_path / "out", time.monotonic() + 60, tries=4)
    with open(log.path, "a") as f:
        f.write('{"section": "a", "comm')  # a kill
        f.write("\n")
    attack([section], log, tmp_path / "out", time.monotonic() + 60, tries=None)
    assert seen.read_text() == "0 1 2 3 4 5 6 7 8 9 " and log.result("a").tries == 10
    later = Log(tmp_path / "out", "two")
    assert later.result("a").tries == 0 and later.latest("a", 10).commit == "one"
    attack([section], later, tmp_path / "out", time.monotonic() + 60, tries=1)
    assert seen.read_text().endswith("9 0 ")
    assert (later.latest("a", 1).commit, later.latest("a", 10).commit) == ("two", "one")
    assert later.latest("a", 11).commit == "two"
