"""What `State.restore` takes, and what it calls damaged, under right hashes and the same options."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gdpo.train import checkpoint as checkpoints
from gdpo.train.checkpoint import Damaged
from gdpo.train.state import State

IDENTITY = {"identity": {"seed": 0}, "data": "crops", "samples_per_step": 1}


def made(step: int = 0, average: bool = True) -> State:
    torch.manual_seed(step)
    layer = nn.Linear(3, 2)
    parameters = {f"unet/{name}": p for name, p in layer.named_parameters()}
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(step):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    copies = {k: p.detach().clone() for k, p in parameters.items()} if average else {}
    return State(step, parameters, optimizer, copies, None, IDENTITY)


def saved(root: Path):
    folder = made(2).save(root, keep=2)
    return folder, checkpoints.load(folder)


def test_what_was_saved_is_restored_to_the_bit(tmp_path):
    folder, found = saved(tmp_path)
    state, original = made(), made(2)
    state.restore(folder, found)
    assert state.step == 2
    for key, p in original.parameters.items():
        assert torch.equal(state.parameters[key], p) and torch.equal(state.average[key], original.average[key])
        for part, value in original.optimizer.state[p].items():
            assert torch.equal(state.optimizer.state[state.parameters[key]][part], value)


@pytest.mark.parametrize(
    "stem, change",
    [
        ("trainable", lambda t: t.pop("unet/bias")),
        ("trainable", lambda t: t.update({"unet/more": torch.ones(1)})),
        ("trainable", lambda t: t.update({"unet/bias": torch.ones(3)})),
        ("trainable", lambda t: t.update({"unet/bias": torch.ones(2, dtype=torch.int64)})),
        ("ema", lambda t: t.pop("unet/weight")),
        ("optimizer", lambda t: t.pop("unet/weight/exp_avg_sq")),
        ("optimizer", lambda t: t.update({"unet/weight/exp_avg": torch.ones(2)})),
        ("optimizer", lambda t: t.update({"unet/weight/step": torch.ones(2)})),
        ("optimizer", lambda t: t.update({"unet/more/exp_avg": torch.ones(2)})),
        ("optimizer", lambda t: t.update({"unet/weight/momentum": torch.ones(2, 3)})),
    ],
)
def test_tensors_of_another_model_are_damage_and_change_nothing(tmp_path, stem, change):
    folder, found = saved(tmp_path)
    change(found.tensors[stem])
    state = made()
    before = {k: p.detach().clone() for k, p in state.parameters.items()}
    with pytest.raises(Damaged, match=rf"checkpoint-0000002/{stem}\.safetensors does not fit this model"):
        state.restore(folder, found)
    assert state.step == 0 and all(torch.equal(p, before[k]) for k, p in state.parameters.items())


def test_a_checkpoint_that_does_not_fit_is_skipped_for_the_one_before(tmp_path):
    made(1).save(tmp_path, keep=3)
    wrong = checkpoints.load(made(2).save(tmp_path, keep=3))
    wrong.tensors["trainable"]["unet/bias"] = torch.ones(5)
    checkpoints.save(tmp_path, wrong, keep=3)
    folder, found, skipped = checkpoints.newest_valid(tmp_path, made().check_fits)
    assert found.state.step == 1 and folder.name == "checkpoint-0000001"
    assert len(skipped) == 1 and "checkpoint-0000002/trainable.safetensors" in skipped[0]
