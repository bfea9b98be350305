"""The GDPO step's benchmark compares like with like: the same result at the start, and only the known waste apart."""

import math
from collections import Counter

import pytest
import torch

from benchmarks import gdpo_step


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
    found = gdpo_step.worker("ours", ["plain", "checkpointing", "reuse-latents"], "", 64, 2, "fp32", 1)
    assert found["plain"] == {"error": "out of memory: CUDA out of memory"}
    assert found["checkpointing"] == {"error": "the first loss is 0.9, not log 2"}
    assert found["reuse-latents"]["seconds"] == [1.0]


def test_a_wrong_first_loss_is_refused(monkeypatch, mini_sd, accelerator):
    monkeypatch.setattr(gdpo_step, "_ours", lambda *_: lambda batch, step: 0.75)
    with pytest.raises(RuntimeError, match=r"ours plain: the first loss is 0\.7500, not log 2"):
        gdpo_step._steps("ours", "plain", str(mini_sd), accelerator, 64, 2, 1)


def test_a_process_that_dies_is_an_error_of_its_variants(capsys):
    found = gdpo_step._spawn("ours", ["plain", "reuse-latents"], "/nonexistent", 64, 2, "fp32", 1)
    assert list(found) == ["plain", "reuse-latents"]
    assert all(run["error"].startswith("the process failed (2): ") for run in found.values())
    assert "/nonexistent" in capsys.readouterr().err


@pytest.mark.parametrize("alone", [False, True])
def test_rows_are_of_what_ran(monkeypatch, capsys, alone):
    def spawn(procedure, variants, *rest):
        good = {"seconds": [2.0 if procedure == "released" else 1.0], "cpu_seconds": [1.0], "peak_mib": 4.0}
        runs = {v: good | {"first_loss": 0.693} for v in variants}
        if procedure == "released":
            runs["checkpointing"] = {"error": "out of memory: CUDA out of memory"}
        return runs | ({"reuse-latents": {"error": "wrong"}} if procedure == "ours" else {})

    rows = []
    monkeypatch.setattr(gdpo_step, "_spawn", spawn)
    monkeypatch.setattr("benchmarks.rows.require_clean", lambda: None)
    monkeypatch.setattr("benchmarks.rows.append_row", lambda name, **figures: rows.append(figures))
    variants = ["plain", "checkpointing", "reuse-latents"]
    options = ["--folder", "F", "--precision", "bf16", "--together", "--variants", *variants]
    monkeypatch.setattr("sys.argv", ["gdpo_step", *options, *(["--alone"] if alone else [])])
    assert gdpo_step.main() == 1  # a wrong figure; memory that does not suffice is an answer
    assert capsys.readouterr().err == "no figure: ours reuse-latents, bf16: wrong\n"
    assert [row["variant"] for row in rows] == (variants[:2] if alone else variants)
    assert rows[0].get("speedup") == (None if alone else 2) and rows[0]["ours_first_loss"] == 0.693
    assert rows[1].get("released_error") == (None if alone else "out of memory: CUDA out of memory")
    assert "speedup" not in rows[1] and rows[1]["ours_p50_s"] == 1
