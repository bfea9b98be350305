"""The reward of a group: its three normalisations against plain Python, and that all who show it show the same."""

import inspect
import json
import statistics as plain

import pytest
import torch

from gdpo.kernels import attribute_ratios, gdpo_loss
from gdpo.kernels import reward as kernel
from gdpo.scores import group as module
from gdpo.scores.group import GroupReward
from gdpo.scores.rewards import Reward
from gdpo.train.config import GDPOConfig
from tests.support.training import GDPO, train_here

# A fidelity score prefers the first sample, one perceptual score the second, the other the third.
SCORES = {
    "f": ("fidelity", [[30.0, 27.0, 26.0, 28.5]]),
    "p": ("perceptual", [[40.0, 70.0, 45.0, 52.0]]),
    "q": ("perceptual", [[0.2, 0.1, 0.9, 0.15]]),
}


def judge(names="fpq", **options) -> GroupReward:
    rewards = [Reward(n, SCORES[n][0], lambda *_, n=n: torch.tensor(SCORES[n][1])) for n in names]
    return GroupReward(rewards, **options)


def expected(names: str, weights: list[float], normalization: str, smooth: float) -> list[float]:
    """R of the four samples, by the formulas of gdpo.scores.group."""
    total = [0.0] * 4
    for kind, share in (("fidelity", smooth), ("perceptual", 1 - smooth)):
        own = {n: w for n, w in zip(names, weights) if SCORES[n][0] == kind}
        for n, w in own.items():
            values = SCORES[n][1][0]
            if normalization != "none":
                values = [(v - min(values)) / (max(values) - min(values)) for v in values]
            over = sum(own.values()) if normalization == "group" else sum(weights)
            total = [t + share * w / over * v for t, v in zip(total, values)]
    return total


@pytest.fixture
def pictures():
    """[1,4,3,10,20], [1,3,10,20]: two patches, for Triton's interpreter."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(1, 4, 3, 10, 20, generator=g) * 2 - 1, torch.rand(1, 3, 10, 20, generator=g) * 2 - 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("normalization", ["group", "weighted", "none"])
@pytest.mark.parametrize(
    ("names", "weights"), [("fpq", [1, 1, 1]), ("fpq", [9, 1, 5]), ("fp", [100, 1]), ("pq", [1, 3])]
)
def test_reward_and_advantage_are_the_formula(backend, normalization, names, weights, pictures):
    found = judge(names, weights=weights, normalization=normalization, rho=0.3, backend=backend)(*pictures)
    wanted = expected(names, weights, normalization, smooth=0.3)
    assert found.reward[0].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    mean, deviation = plain.fmean(wanted), plain.stdev(wanted)
    assert found.advantage[0].tolist() == pytest.approx([(r - mean) / deviation for r in wanted], abs=2e-4)


def test_weights_choose_the_winner_and_only_where_they_count(pictures):
    def winner(**options) -> int:
        return int(judge("fp", rho=0.5, **options)(*pictures).reward.argmax())

    assert winner(weights=[100, 1], normalization="weighted") == 0
    assert winner(weights=[1, 1], normalization="weighted") == winner() == 1
    assert torch.equal(judge("fp", weights=[1, 100])(*pictures).reward, judge("fp")(*pictures).reward)


def test_weights_that_change_nothing_are_told():
    line = judge("fp", weights=[100, 1]).warning()
    assert "reward_weights [100, 1] change nothing" in line and "reward_normalization weighted" in line
    assert "(fidelity: f; perceptual: p)" in line
    for harmless in ({"weights": [2, 2]}, {}, {"weights": [100, 1], "normalization": "weighted"}):
        assert judge("fp", **harmless).warning() is None
    assert judge("fpq", weights=[1, 9, 1]).warning() is None
    assert "change nothing" in judge("fpq", weights=[5, 1, 1]).warning()


def test_options_are_checked():
    with pytest.raises(ValueError, match="reward_normalization must be group, weighted, none; got 'batch'"):
        judge(normalization="batch")
    with pytest.raises(ValueError, match=r"one number per reward function \(3\); got 2"):
        judge(weights=[1, 2])
    with pytest.raises(ValueError, match="reward_weights must be finite and above 0"):
        judge(weights=[1, 2, 0])
    with pytest.raises(ValueError, match=r"rho must be 'auto' or a number in \[0,1\]; got 1.5"):
        judge(rho=1.5)


def test_what_stands_twice_is_the_same():
    """The kernels import nothing of ours, and their defaults are part of their signatures."""
    assert GroupReward([]).threshold == default(attribute_ratios, "threshold")
    assert GDPOConfig().beta == default(gdpo_loss, "beta")


def default(function, name):
    return inspect.signature(function).parameters[name].default


def without_weights(fidelity, perceptual, smooth, texture, fidelity_weights=None, perceptual_weights=None):
    """The fault that was: the log and the sheets took every metric alike."""
    return kernel.group_scores(fidelity, perceptual, smooth, texture)


@pytest.mark.parametrize("fault", [False, True])
def test_log_sheets_and_training_have_one_reward(fault, crops, trained, tmp_path, monkeypatch):
    """`reward`, `reward_std` and `gain/reward` of a run, against the advantage that it trained on."""
    if fault:
        monkeypatch.setattr(module, "group_scores", without_weights)
    judged = []
    call = GroupReward.__call__
    monkeypatch.setattr(GroupReward, "__call__", lambda self, *a: judged.append(call(self, *a)) or judged[-1])
    options = ["--reward_funcs=[psnr_y,naturalness,piqe]", "--reward_weights=[1,1,100]", "--train_batch_size=2"]
    options += ["--rho=0.25", "--num_generations=4", "--validation_images=1", "--max_train_steps=1"]
    data = [f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}"]
    train_here(monkeypatch, *GDPO, *data, *options)
    steps, gains = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    step, preview, _group_sheet = judged
    assert steps["reward"] == pytest.approx(float(step.reward.mean()), rel=1e-6)
    assert steps["reward_std"] == pytest.approx(float(step.reward.std(dim=1).mean()), rel=1e-6)
    before, after = preview.reward[0].unflatten(0, (2, -1)).mean(1).tolist()
    assert gains["gain/reward"] == pytest.approx(after - before, abs=1e-6)

    def standardised(reward: torch.Tensor) -> torch.Tensor:
        return (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)

    for found in judged:
        same = torch.allclose(standardised(found.reward), found.advantage, atol=1e-3)
        assert same != fault, "the advantage is the reward's, unless the reward is computed without the weights"
        assert found.smooth.unique().tolist() == [0.25]


def test_the_command_says_that_weights_change_nothing(crops, trained, tmp_path, monkeypatch, capfd):
    data = [f"--model.pretrained={trained}", f"--data.folder={crops}", f"--output_dir={tmp_path / 'run'}"]
    short = ["--max_train_steps=1", "--validation_images=0", "--reward_weights=[100,1]"]
    train_here(monkeypatch, *GDPO, *data, *short)
    assert "warning: reward_weights [100.0, 1.0] change nothing" in capfd.readouterr().err
