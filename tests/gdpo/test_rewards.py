"""The registry: what each word means, the sign of every score, the user's own functions, and errors one can act on."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gdpo.kernels import attribute_statistics
from gdpo.scores.features import PerceptualDistance
from gdpo.scores.metrics import naturalness, niqe, piqe, ssim_y
from gdpo.scores.registry import REGISTRY, build_rewards, require_finite

OFFLINE = ["psnr_y", "region_fidelity", "region_detail", "ssim_y", "naturalness", "niqe", "piqe"]


@pytest.fixture
def group():
    """Two pictures (B=2), three samples each: closer and closer to the target. -> samples, target, statistics."""
    g = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 64, 64, generator=g) * 2 - 1
    noise = torch.randn(2, 3, 3, 64, 64, generator=g)
    strength = torch.tensor([0.4, 0.2, 0.02])[None, :, None, None, None]
    samples = (target[:, None] + strength * noise).clamp(-1, 1)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[:, :, 32:] = True
    return samples, target, attribute_statistics(samples, target, mask, backend="torch")


@pytest.mark.parametrize("name", OFFLINE)
def test_every_offline_reward_scores_each_sample(name, group):
    (reward,) = build_rewards([name])
    got = reward.score(*group)
    assert reward.name == name and reward.kind == REGISTRY[name].kind
    assert got.shape == (2, 3) and got.dtype == torch.float32


@pytest.mark.parametrize("name", ["psnr_y", "region_fidelity", "region_detail", "ssim_y"])
def test_higher_is_better_with_a_reference(name, group):
    got = build_rewards([name])[0].score(*group)
    assert (got.diff(dim=1) > 0).all(), got


def test_values_are_the_metrics_of_each_sample_in_its_place(group):
    samples, target, statistics = group
    scores = {r.name: r.score(*group) for r in build_rewards(["psnr_y", "ssim_y", "naturalness"])}
    assert torch.equal(scores["psnr_y"], statistics.psnr_y)
    for b in range(2):
        for i in range(3):
            x, y = ((p[None] + 1) / 2 for p in (samples[b, i], target[b]))
            torch.testing.assert_close(scores["ssim_y"][b, i], ssim_y(x, y)[0].float(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(scores["naturalness"][b, i], naturalness(x)[0], rtol=1e-4, atol=1e-5)


def test_metrics_where_less_is_better_are_negated(group):
    for name, want in (
        ("niqe", niqe(group[0].flatten(0, 1) / 2 + 0.5, "photos-32")),
        ("piqe", piqe(group[0].flatten(0, 1) / 2 + 0.5)),
    ):
        got = build_rewards([name])[0].score(*group)
        torch.testing.assert_close(got.flatten(), -want.float())


def test_vgg_is_minus_the_distance(group, monkeypatch):
    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setattr("gdpo.scores.features.PerceptualDistance", Distance)
    got = build_rewards(["vgg"])[0].score(*group)
    assert (got < 0).all() and (got.diff(dim=1) > 0).all()
    assert PerceptualDistance is not Distance


def my_score(samples, target):
    return -(samples - target).abs().mean((1, 2, 3))


my_score.kind = "fidelity"


def plain_score(samples, target):
    return samples.mean((1, 2, 3))


def broken_score(samples, target):
    values = samples.mean((1, 2, 3))
    values[4] = float("nan")
    return values


def short_score(samples, target):
    return samples.mean((1, 2, 3))[:3]


def picky_score(samples, target):
    raise ValueError("it needs 224x224")


def buggy_score(samples, target):
    return {}["weights"]


@pytest.fixture
def own(monkeypatch):
    module = ModuleType("own_rewards")
    for f in (my_score, plain_score, broken_score, short_score, picky_score, buggy_score):
        setattr(module, f.__name__, f)
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_rewards", module)


def test_a_function_of_the_users_own(own, group):
    mine, plain = build_rewards(["own_rewards:my_score", "own_rewards:plain_score"])
    assert (mine.kind, plain.kind) == ("fidelity", "perceptual")
    want = -(group[0] - group[1][:, None]).abs().mean((2, 3, 4))
    torch.testing.assert_close(mine.score(*group), want)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken_score", "reward 'own_rewards:broken_score' is nan for image 1, sample 1 of the batch"),
        (
            "short_score",
            "reward 'own_rewards:short_score': it must return one number per picture, a tensor [6]; got shape (3,)",
        ),
        ("picky_score", "reward 'own_rewards:picky_score': it needs 224x224"),
        ("buggy_score", "reward 'own_rewards:buggy_score' failed (KeyError: 'weights'); GDPO_TRACEBACK=1 shows where"),
    ],
)
def test_bad_scores_are_named(own, group, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        require_finite({r.name: r.score(*group) for r in build_rewards(["psnr_y", f"own_rewards:{name}"])})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["psnr"], r"unknown reward 'psnr'; known are psnr_y, "),
        ([], "must name at least one"),
        (["psnr_y", "psnr_y"], "names 'psnr_y' more than once"),
        (["no_such_module:f"], "must be module:function, importable from here"),
        (["own_rewards:nothing"], "must be module:function"),
        (["own_rewards:number"], "must be a function"),
        ([":f"], "must be module:function"),
    ],
)
def test_bad_names_are_named(own, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_rewards(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [("def f(:\n", "SyntaxError: "), ("1 / 0\n", "ZeroDivisionError: "), ("import no_such_module\n", "no_such_module")],
)
def test_a_module_that_cannot_be_imported_is_named(text, message, tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"reward 'own_broken:f' must be module:function.*{message}"):
        build_rewards(["own_broken:f"])


def test_mismatched_shapes_are_named(group):
    samples, target, statistics = group
    with pytest.raises(ValueError, match=r"samples must be \[B,G,3,H,W\]"):
        build_rewards(["psnr_y"])[0].score(samples[0], target, statistics)


def test_scores_carry_no_gradient(own, group):
    samples, target, statistics = group
    got = build_rewards(["own_rewards:plain_score"])[0].score(samples.requires_grad_(), target, statistics)
    assert not got.requires_grad


class FakePyiqa(ModuleType):
    """Stands in for pyiqa: create_metric(name, device=, as_loss=) -> a metric of [N,3,H,W] in [0,1] -> [N,1]."""

    def __init__(self, lower_better=False, error=None):
        super().__init__("pyiqa")
        self.lower_better, self.error, self.asked = lower_better, error, []

    def create_metric(self, name, device, as_loss):
        if self.error:
            raise self.error
        self.asked.append(name)

        class Metric(SimpleNamespace):
            def __call__(self, x):
                assert x.min() >= 0 and x.max() <= 1
                return x.mean((1, 2, 3))[:, None]

        return Metric(lower_better=self.lower_better)


@pytest.mark.parametrize("lower_better", [False, True])
def test_pyiqa_metrics_are_turned_so_that_higher_is_better(monkeypatch, group, lower_better):
    fake = FakePyiqa(lower_better)
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    rewards = build_rewards(["musiq", "maniqa", "maniqa-pipal"])
    assert fake.asked == ["musiq", "maniqa", "maniqa-pipal"]
    want = (group[0] / 2 + 0.5).mean((2, 3, 4)) * (-1 if lower_better else 1)
    for r in rewards:
        assert r.kind == "perceptual"
        torch.testing.assert_close(r.score(*group), want)


def test_missing_pyiqa_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ImportError, match=r"reward 'musiq' needs the package pyiqa .*gdpo-sr\[iqa\]"):
        build_rewards(["psnr_y", "musiq"])


def test_missing_weights_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", FakePyiqa(error=OSError("no route to host")))
    with pytest.raises(RuntimeError, match=r"reward 'maniqa': pyiqa could not load it or its weights .*no route"):
        build_rewards(["maniqa"])
