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
