"""`make bench-gpu` without a GPU: every part at miniature size; what happens when one is missing, fails or hangs."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_parts
from engine.io import rows

ROOT = Path(__file__).resolve().parents[2]


def command(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=500, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.slow  # minutes: every part in miniature
def test_the_dry_run_does_every_part_writes_no_rows_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "commit", lambda: ("abc", False))  # whoever commits while this runs

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--minutes", "30", "--out", str(out), *options])
        code, said = gpu.main(), capsys.readouterr().err
        assert code == 0, said
        return said

    before = {p: p.read_bytes() for p in rows.RESULTS.glob("*")}
    out = tmp_path / "out"
    call()
    state = json.loads((out / "state.json").read_text())["parts"]
    assert list(state) == list(gpu.PARTS)
    for name, found in state.items():
        absent = gpu.missing(gpu.PARTS[name].needs)
        assert found["status"] == ("skipped" if absent else "done"), found
        assert all(module in found.get("reason", "") for module in absent)
    assert '"variant": "checkpointing"' in (out / "gdpo-step.log").read_text()
    assert (out / "gpu_gdpo_step.png").read_bytes()[:4] == b"\x89PNG"
    assert '"variant": "compile-frozen"' in (log := (out / "gdpo-compiled.log").read_text()) and "released" not in log
    assert {p: p.read_bytes() for p in rows.RESULTS.glob("*")} == before
    assert (out / gpu.ARCHIVE).stat().st_size > 1000

    began = time.monotonic()
    done_before = [name for name, found in state.items() if found["status"] == "done"]
    again = call("--parts", *done_before, "--again", "environment")
    assert again.count("done before") == len(done_before) - 2
    for repeated in ("environment", "plots"):  # asked for; new rows may have come
        assert f"{repeated}: {gpu.PARTS[repeated].about} ..." in again
    assert time.monotonic() - began < 30


def stand_in(out: Path, code: str, seconds=20, needs=(), after=()) -> gpu.Part:
    """A part that is a line of Python; that it was started is a letter in the file `ran`."""
    script = f"open({str(out / 'ran')!r}, 'a').write('x'); {code}"
    return gpu.Part("a stand-in", seconds, needs, lambda run: [script], after)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {
        "good": stand_in(tmp_path, "print('fine')"),
        "absent": stand_in(tmp_path, "", needs=("json", "no_such_package", "no_such.module", "nor_this | json")),
        "bad": stand_in(tmp_path, "raise SystemExit('it broke')"),
        "after-bad": stand_in(tmp_path, "", after=("bad",)),
        "refuses": stand_in(tmp_path, f"print('no driver'); raise SystemExit({gpu.SKIPPED})"),
        "after-good": stand_in(tmp_path, "print('fine')", after=("good",)),
    })  # fmt: skip
    process = gpu._process
    monkeypatch.setattr(gpu, "_process", lambda command, *rest: process([command[0], "-c", command[2]], *rest))
    return gpu.Run(True, tmp_path, tmp_path / "cache", tmp_path / "results", "abc", None)


def ran(run):
    return len((run.out / "ran").read_text())


def states(run):
    return {name: found["status"] for name, found in gpu.load_state(run).items()}


def test_a_failed_part_is_named_and_the_others_go_on(run):
    problems = gpu.run_parts(list(gpu.PARTS), [], run, 1)
    assert problems == [f"bad: exit code 1: it broke (log: {run.out / 'bad.log'})"]
    assert states(run) == {
        "good": "done", "absent": "skipped", "bad": "failed", "after-bad": "skipped", "refuses": "skipped",
        "after-good": "done",
    }  # fmt: skip
    reasons = {name: found.get("reason") for name, found in gpu.load_state(run).items()}
    assert reasons["absent"] == "not installed here: no_such_package, no_such.module"
    assert reasons["after-bad"] == "it needs the part bad, which is not done"
    assert reasons["refuses"] == "no driver"


def test_what_is_done_at_this_commit_is_not_repeated(run):
    gpu.run_parts(["good"], [], run, 1)
    gpu.run_parts(["good", "after-good"], [], run, 1)
    assert ran(run) == 2
    gpu.run_parts(["good"], ["good"], run, 1)
    assert ran(run) == 3
    for other in ({"commit": "def"}, {"gpu": "another"}, {"dry": False}):
        assert not gpu.is_done("good", gpu.load_state(run), replace(run, **other))


def test_a_part_that_hangs_is_stopped_with_its_children(run, monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    child = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid))"
    monkeypatch.setitem(gpu.PARTS, "bad", stand_in(tmp_path, f"{child}; time.sleep(60)", seconds=3))
    began = time.monotonic()
    (problem,) = gpu.run_parts(["bad"], [], run, 1)
    assert problem.startswith("bad: stopped after 3 s") and time.monotonic() - began < 20
    status, gone = Path(f"/proc/{pid.read_text()}/status"), False
    while not gone and time.monotonic() - began < 40:  # a killed process may take a moment
        gone = not status.exists() or "State:\tZ" in status.read_text()
        time.sleep(0.1)
    assert gone


def test_time_limits_grow_with_the_minutes_and_on_a_processor(run, monkeypatch, tmp_path):
    assert [gpu.scale_of(*given) for given in ((9, False), (3, False), (27, False), (9, True))] == [1, 1, 3, 4]
    monkeypatch.setitem(gpu.PARTS, "bad", stand_in(tmp_path, "import time; time.sleep(60)", seconds=1))
    (problem,) = gpu.run_parts(["bad"], [], replace(run, scale=3), 1)
    assert problem.startswith("bad: stopped after 3 s")
    for part, seconds in ((gpu._gdpo_step("plain", seconds=100), "250"), (gpu._inference(512, 1, seconds=60), "150")):
        command = part(replace(run, dry=False, scale=2.5))
        assert command[command.index("--seconds") + 1] == seconds


def test_whatever_there_is_is_packed(run, tmp_path):
    gpu.run_parts(["good", "bad"], [], run, 1)
    run.results.mkdir()
    for name in ("kernels.jsonl", "gpu_kernels.png", "notes.txt"):
        (run.results / name).write_text(name)
    own = {"gpu/good.log", "gpu/bad.log", "gpu/state.json"}
    for dry, rows_too in ((True, set()), (False, {"results/kernels.jsonl", "results/gpu_kernels.png"})):
        with tarfile.open(gpu.pack(replace(run, dry=dry))) as archive:
            assert set(archive.getnames()) == own | rows_too
            assert archive.extractfile("gpu/bad.log").read() == (run.out / "bad.log").read_bytes() == b"it broke\n"


TWO_PARTS = """
import sys
from benchmarks import gpu
from engine.io import cli
process, gpu.commit = gpu._process, lambda: ("abc", False)
gpu._process = lambda command, *rest: process([command[0], "-c", command[2]], *rest)
second = f"import os, time; print(os.getpid(), flush=True); time.sleep({sys.argv.pop(1)})"
parts = {"first": "print('a row')", "second": second}
gpu.PARTS = {name: gpu.Part("a stand-in", 60, (), lambda run, code=code: [code], ()) for name, code in parts.items()}
cli.run(gpu.main)
"""


@pytest.mark.parametrize("signal_, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_call_that_is_killed_keeps_what_is_done_and_goes_on(signal_, code, tmp_path):
    def start(seconds):
        line = [sys.executable, "-c", TWO_PARTS, seconds, "--dry", "--out", str(tmp_path)]
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  also where a shell had it ignored
        return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)

    killed, log, end = start("60"), tmp_path / "second.log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.1)
    child = Path(f"/proc/{log.read_text().strip()}/status")
    killed.send_signal(getattr(signal, signal_))
    said = killed.communicate(timeout=30)[1]
    assert killed.returncode == code and "packed: " in said and "Traceback" not in said
    assert not child.exists() or "State:\tZ" in child.read_text()  # and the machine is free
    with tarfile.open(tmp_path / gpu.ARCHIVE) as archive:
        assert archive.extractfile("gpu/first.log").read() == b"a row\n"
    again = start("0")
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 0 and "first: a stand-in: done before" in said and said.count(" done in ") == 1


def test_what_the_time_does_not_reach_waits_for_the_next_call(run):
    problems = gpu.run_parts(["good", "after-good"], [], run, 0.01)
    assert len(problems) == 2 and "not reached in 0.01 minutes" in problems[0] and states(run) == {}


def test_figures_of_code_that_failed_its_tests_are_not_taken(run, monkeypatch, tmp_path):
    checked = replace(stand_in(tmp_path, "print('fine')"), checked=("bad", "absent"))
    monkeypatch.setitem(gpu.PARTS, "figures", checked)
    gpu.run_parts(["absent", "figures"], [], run, 1)
    assert states(run)["figures"] == "done"  # what could not run has not failed
    slow = stand_in(tmp_path, "import time; time.sleep(60)", seconds=2)
    with monkeypatch.context() as patch:
        patch.setitem(gpu.PARTS, "bad", slow)
        gpu.run_parts(["bad", "figures"], ["figures"], run, 1)
    assert states(run)["figures"] == "done"  # slow is not wrong
    gpu.run_parts(["bad", "figures"], ["figures"], run, 1)
    found = gpu.load_state(run)["figures"]
    assert found["status"] == "skipped" and found["reason"].startswith("bad has failed")
    gpu.run_parts(["figures"], [], replace(run, commit="def"), 1)
    assert states(run)["figures"] == "done"  # another commit, not tested yet


def test_plots_are_drawn_when_the_time_is_used_up(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESERVED", 53)
    monkeypatch.setitem(gpu.PARTS, "bad", stand_in(tmp_path, "import time; time.sleep(60)", seconds=60))
    monkeypatch.setitem(gpu.PARTS, "plots", stand_in(tmp_path, "print('fine')"))
    (problem,) = gpu.run_parts(["bad", "plots"], [], run, 1)
    assert problem.startswith(("bad: stopped after 7 s", "bad: stopped after 6 s")) and states(run)["plots"] == "done"


def test_what_compiles_costs_no_other_figure():
    assert list(gpu.PARTS)[-3:] == ["inference-compiled", "gdpo-compiled", "plots"]


def test_a_kernel_that_fails_its_tests_costs_what_is_made_of_it():
    assert all(part in gpu.PARTS for part in gpu.TESTED)
    for part in ("gdpo-step", "gdpo-compiled"):
        assert set(gpu.PARTS[part].checked) == gpu.TESTED.keys()
    run = gpu.Run(False, Path("o"), Path("c"), Path("r"), "abc", "GPU", {"environment", "test-loss", "test-norm"})
    assert gpu.PARTS["kernels"].command(run)[-2:] == ["--tested", "[gdpo_loss,group_norm]"]


def test_a_torch_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"sees no GPU: GPU_PYTHON names"):
        gpu_parts.measure_environment(SimpleNamespace(dry=False), print)
    assert all("environment" in part.after for name, part in gpu.PARTS.items() if name != "environment")


def test_a_foreign_state_is_refused(run):
    (run.out / "state.json").write_text('{"parts": [1]}')
    with pytest.raises(ValueError, match="is not a state of this command; remove it"):
        gpu.load_state(run)


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path):
    nothing = command("--out", str(tmp_path), PATH="/nonexistent")  # neither git nor nvidia-smi
    assert nothing.returncode == 2 and len(nothing.stderr.splitlines()) == 1 and "GDPO_COMMIT" in nothing.stderr
    no_gpu = command("--out", str(tmp_path), PATH="/nonexistent", GDPO_COMMIT="abc")
    assert no_gpu.returncode == 2 and "no NVIDIA GPU here" in no_gpu.stderr
    assert command("--parts", "nonsense").returncode == 2
    assert "minutes must be above 0" in command("--dry", "--minutes", "0").stderr
