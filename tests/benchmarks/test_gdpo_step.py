"""The GDPO step's benchmark compares like with like: the same result at the start, and only the known waste apart."""

import io
import json
import math
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gdpo_step
from engine.io import rows

pytestmark = pytest.mark.slow  # minutes: the benchmark in miniature, many times


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def counted(monkeypatch):
    """Pictures that pass through each part of any model."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    counts: Counter[str] = Counter()
    for part, owner, method in [
        ("encoded", AutoencoderKL, "encode"),
        ("decoded", AutoencoderKL, "decode"),
        ("unet", UNet2DConditionModel, "forward"),
        ("texts", CLIPTextModel, "forward"),
    ]:
        original = getattr(owner, method)

        def wrapper(self, x=None, *rest, _original=original, _part=part, **named):
            first = x if x is not None else named["input_ids"]
            counts[_part] += len(first)
            return _original(self, first, *rest, **named)

        monkeypatch.setattr(owner, method, wrapper)
    return counts


@pytest.mark.parametrize(
    ("procedure", "expected"),
    [
        # LR and 6 samples encoded; 6 sampled, 6 by the policy, 6 by the reference; 18 decodes of which 6 are looked at.
        (gdpo_step._released, {"encoded": 7, "decoded": 18, "unet": 18, "texts": 13}),
        (gdpo_step._ours, {"encoded": 7, "decoded": 6, "unet": 18, "texts": 0}),
    ],
    ids=["released", "ours"],
)
def test_a_step_costs_what_it_should(procedure, expected, mini_sd, accelerator, counted):
    step = procedure(str(mini_sd), accelerator, 64, 6)
    losses = [step(gdpo_step._batch(64, 0, "cpu"), 0)]
    counted.clear()
    losses.append(step(gdpo_step._batch(64, 1, "cpu"), 1))
    assert losses[0] == pytest.approx(math.log(2), abs=2e-3)  # policy = reference before the first update
    assert math.isfinite(losses[1]) and losses[1] != losses[0]
    assert dict(counted) == {k: v for k, v in expected.items() if v}


def test_the_released_procedure_holds_two_unets_and_trains_one(mini_sd, accelerator):
    from benchmarks.released_procedure import ReleasedProcedure

    released = ReleasedProcedure(mini_sd, accelerator)
    frozen = [p.clone() for p in released.reference.parameters()]
    before = [p.detach().clone() for p in released.trained]
    for step in range(2):
        released.step(gdpo_step._batch(64, step, torch.device("cpu")), step)
    assert all(torch.equal(a, b) for a, b in zip(frozen, released.reference.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, released.trained))
    assert not {id(p) for p in released.reference.parameters()} & {id(p) for p in released.policy.parameters()}


def test_what_fails_costs_its_own_variant(monkeypatch):
    def steps(procedure, variant, *rest):
        if variant == "plain":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And advice.")
        if variant == "checkpointing":
            raise RuntimeError("the first loss is 0.9,\nnot log 2")
        return {"seconds": [1.0], "cpu_seconds": [1.0], "peak_mib": 1.0, "first_loss": 0.7}

    monkeypatch.setattr(gdpo_step, "_steps", steps)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: None)
    found = dict(gdpo_step.worker("ours", ["plain", "checkpointing", "reuse-latents"], "", 64, 2, "fp32", 1))
    assert found["plain"] == {"error": "out of memory: CUDA out of memory"}
    assert found["checkpointing"] == {"error": "the first loss is 0.9, not log 2"}
    assert found["reuse-latents"]["seconds"] == [1.0]


def test_a_wrong_first_loss_is_refused(monkeypatch, mini_sd, accelerator):
    monkeypatch.setattr(gdpo_step, "_ours", lambda *_: lambda batch, step: 0.75)
    with pytest.raises(RuntimeError, match=r"ours plain: the first loss is 0\.7500, not log 2"):
        gdpo_step._steps("ours", "plain", str(mini_sd), accelerator, 64, 2, 1)


def test_a_process_that_dies_costs_the_variant_that_it_was_at(monkeypatch, capsys):
    def process(command, **_):
        started.append(json.loads(command[-1])[1])
        first = started[-1][0]
        out = f'a warning\n{gdpo_step.MARK}["{first}", {{"seconds": [1.0]}}]\n'
        code = 0 if first == "reuse-latents" else -9
        said = io.StringIO("Killed\n" if first == "checkpointing" else out if code == 0 else out + "Killed\n")
        return SimpleNamespace(stdout=said, wait=lambda: code, returncode=code)

    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", process)
    variants = ["plain", "checkpointing", "reuse-latents"]
    assert list(gdpo_step._spawn("ours", variants, "F")) == [
        ("plain", {"seconds": [1.0]}),
        ("checkpointing", {"error": "the process failed (-9): Killed"}),
        ("reuse-latents", {"seconds": [1.0]}),
    ]
    assert started == [variants, ["reuse-latents"]] and variants[0] == "plain"
    assert capsys.readouterr().err.count("a warning\n") == 2


def test_a_result_is_there_before_the_process_has_ended(monkeypatch):
    script = f"""import time; print('{gdpo_step.MARK}["plain", {{}}]', flush=True); time.sleep(60)"""
    processes, popen = [], subprocess.Popen

    def process(command, **named):
        processes.append(popen([command[0], "-c", script], **named))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", process)
    assert next(gdpo_step._spawn("ours", ["plain", "checkpointing"])) == ("plain", {})
    assert processes[0].poll() is None
    processes[0].kill()
    processes[0].wait()


def test_a_process_of_its_own_says_what_it_lacks(capsys):
    found = dict(gdpo_step._spawn("ours", ["plain"], "/nonexistent", 64, 2, "fp32", 1))
    assert "/nonexistent" in found["plain"]["error"] and "Traceback" in capsys.readouterr().err


def test_the_check_sees_a_wrong_step(mini_sd, accelerator, monkeypatch):
    right = gdpo_step.check(str(mini_sd), "bf16", 64)
    assert all(0 < right[key] < limit / 2 for key, limit in gdpo_step.LIMITS.items())
    method = gdpo_step._method

    def planted(*args, **more):
        made = method(*args, **more)
        if more["backend"] == "auto":  # the LoRA at two thirds of its strength
            for name, weight in made.trained.items():
                if ".lora_A." in name:
                    weight.data.mul_(0.67)
        return made

    monkeypatch.setattr(gdpo_step, "_method", planted)
    wrong = gdpo_step.check(str(mini_sd), "fp32", 64)
    assert any(wrong[key] > limit for key, limit in gdpo_step.LIMITS.items())


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The command with made-up processes: call(*options) -> (exit code, rows so far, processes started)."""

    def spawn(procedure, variants, *rest):
        if procedure == "check":
            yield "check", check
            return
        started.append((procedure, *variants))
        good = {"seconds": [2.0 if procedure == "released" else 1.0], "cpu_seconds": [1.0], "peak_mib": 4.0}
        runs = {v: good | {"first_loss": 0.693} for v in variants} | failing.get(procedure, {})
        for v in variants:
            if run.killed and (procedure, v) == run.killed:
                raise KeyboardInterrupt
            yield v, runs[v]

    def run(*options):
        variants = ["plain", "checkpointing", "reuse-latents"]
        command = ["--folder", "F", "--precision", "bf16", "--together", "--variants", *variants, *options]
        monkeypatch.setattr("sys.argv", ["gdpo_step", *command])
        started.clear()
        return gdpo_step.main(), rows.read_rows("gdpo_step"), list(started)

    started: list[tuple[str, ...]] = []
    check = dict.fromkeys(gdpo_step.LIMITS, 0.01)
    failing: dict[str, dict] = {}
    run.failing, run.check, run.killed = failing, check, None
    monkeypatch.setattr(gdpo_step, "_spawn", spawn)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "require_clean", lambda: None)
    monkeypatch.setattr(rows, "commit", lambda: ("abc", False))
    return run


@pytest.mark.parametrize("alone", [False, True])
def test_rows_are_of_what_ran(call, capsys, alone):
    call.failing["released"] = {"checkpointing": {"error": "out of memory: CUDA out of memory"}}
    call.failing["ours"] = {"reuse-latents": {"error": "wrong"}}
    code, found, _ = call(*(["--alone"] if alone else []))
    assert code == 1  # a wrong figure; memory that does not suffice is an answer
    assert capsys.readouterr().err == "no figure: ours reuse-latents, bf16: wrong\n"
    last = {row["variant"]: row for row in found}
    assert list(last) == ["plain", "checkpointing", "reuse-latents"][: 2 if alone else 3]
    assert last["plain"]["rounds"] == 2 and last["plain"]["check"] == call.check
    assert last["plain"].get("speedup") == (None if alone else 2) and last["plain"]["ours_first_loss"] == 0.693
    assert last["checkpointing"].get("released_error") == (None if alone else "out of memory: CUDA out of memory")
    assert "speedup" not in last["checkpointing"] and last["checkpointing"]["ours_p50_s"] == 1


def test_rows_come_as_variants_end_and_are_not_measured_again(call, capsys):
    code, found, started = call("--seconds", "1e-9")
    assert code == 1 and "bf16: round 2 was not begun" in capsys.readouterr().err
    # The released procedure's two come first, alone.
    assert [row["rounds"] for row in found] == [0, 0, 1, 1, 1] and len(started) == 2
    code, found, started = call()
    last = {row["variant"]: row for row in found[5:]}
    assert code == 0 and [row["rounds"] for row in last.values()] == [2, 2, 2] and len(started) == 2
    assert last["plain"]["released_rounds_p50_s"] == last["reuse-latents"]["released_rounds_p50_s"] == [2, 2]
    assert call() == (0, found, [])
    assert call("--crop", "128")[2]  # another setting
    call.failing["ours"] = {"checkpointing": {"error": "the process failed (-9): Killed"}}
    assert call("--group", "4")[0] == 1
    call.failing.clear()
    assert call("--group", "4")[2] == [("ours", "checkpointing")] * 2  # its siblings have theirs


def test_what_ended_before_a_time_limit_is_kept(call):
    call.killed = ("ours", "checkpointing")
    with pytest.raises(KeyboardInterrupt):
        call()
    assert [row["variant"] for row in rows.read_rows("gdpo_step")] == ["plain", "checkpointing", "plain"]
    call.killed = None
    assert call()[2][0] == ("ours", "checkpointing", "reuse-latents")  # the rest of the first round


def test_a_step_that_fails_its_check_has_no_figure(call, capsys):
    call.check["gradient"] = 0.9
    assert call() == (1, [], [])
    assert "no figure: bf16: our step is not that in fp32 (gradient)" in capsys.readouterr().err
