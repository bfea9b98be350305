"""The registry: what each word means, the sign of every score, the user's own functions, and errors one can act on."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gdpo.evaluation.columns import build_metrics
from gdpo.kernels import attribute_statistics
from gdpo.scores.features import PerceptualDistance
from gdpo.scores.metrics import naturalness, niqe, piqe, ssim_y
from gdpo.scores.registry import SCORES, Unavailable
from gdpo.scores.rewards import build_rewards, require_finite

OFFLINE = ["psnr_y", "region_fidelity", "region_detail", "ssim_y", "naturalness", "niqe-32", "piqe"]


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
    assert reward.name == name and reward.kind == SCORES[name].kind
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
        ("niqe-32", niqe(group[0].flatten(0, 1) / 2 + 0.5, "photos-32")),
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


def writing_score(samples, target):
    samples.mul_(0.5).add_(0.5)
    target.numpy()[:] = 0  # of which torch sees nothing
    return samples.mean((1, 2, 3))


def leaving_score(samples, target):
    sys.exit(0)


def complex_score(samples, target):
    return samples.mean((1, 2, 3)) * 1j


def settling_score(samples, target):
    """A library that makes itself at home."""
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(1 + torch.get_num_threads())
    torch.set_grad_enabled(True)
    return samples.mean((1, 2, 3))


def far_score(samples, target):
    return torch.ones(len(samples), device="meta")


@pytest.fixture
def own(monkeypatch):
    module = ModuleType("own_rewards")
    for f in (
        my_score,
        plain_score,
        broken_score,
        short_score,
        picky_score,
        buggy_score,
        writing_score,
        leaving_score,
        complex_score,
        settling_score,
        far_score,
    ):
        setattr(module, f.__name__, f)
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_rewards", module)


def test_a_function_of_the_users_own(own, group):
    mine, plain = build_rewards(["own_rewards:my_score", "own_rewards:plain_score"])
    assert (mine.kind, plain.kind) == ("fidelity", "perceptual")
    want = -(group[0] - group[1][:, None]).abs().mean((2, 3, 4))
    torch.testing.assert_close(mine.score(*group), want)


def test_a_function_leaves_the_process_as_it_was(own, group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def settings():
        return (Path.cwd(), torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
                torch.is_grad_enabled())  # fmt: skip

    before = settings()
    settling, plain = build_rewards(["own_rewards:settling_score", "own_rewards:plain_score"])
    got = settling.score(*group)
    assert settings() == before
    assert torch.equal(got, plain.score(*group))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken_score", "reward 'own_rewards:broken_score' is nan for image 1, sample 1 of the batch"),
        (
            "short_score",
            "'own_rewards:short_score': it must return one number per picture, a tensor [6]; got torch.float32 (3,)",
        ),
        ("picky_score", "reward 'own_rewards:picky_score': it needs 224x224"),
        ("leaving_score", "reward 'own_rewards:leaving_score' failed (SystemExit: 0)"),
        ("complex_score", "one number per picture, a tensor [6]; got torch.complex64 (6,)"),
        ("far_score", "reward 'own_rewards:far_score' failed (NotImplementedError: "),
        ("buggy_score", "reward 'own_rewards:buggy_score' failed (KeyError: 'weights'); GDPO_TRACEBACK=1 shows where"),
    ],
)
def test_bad_scores_are_named(own, group, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        require_finite({r.name: r.score(*group) for r in build_rewards(["psnr_y", f"own_rewards:{name}"])})


def test_a_reward_that_writes_into_its_pictures_is_named_and_changes_nothing_else(own, group, capsys):
    samples, target = group[0].clone(), group[1].clone()
    names = ["own_rewards:writing_score", "own_rewards:plain_score", "ssim_y"]
    writing, plain, similar = (r.score(samples, target, group[2]) for r in build_rewards(names))
    assert torch.equal(samples, group[0]) and torch.equal(target, group[1])
    torch.testing.assert_close(writing, plain / 2 + 0.5)
    assert torch.equal(similar, build_rewards(["ssim_y"])[0].score(*group))
    line = capsys.readouterr().err
    assert line.startswith("reward 'own_rewards:writing_score' writes into its pictures") and line.count("\n") == 1


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
    [
        ("def f(:\n", "SyntaxError: "),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("1 / 0\n", "ZeroDivisionError: "),
        ("import no_such_module\n", "no_such_module"),
    ],
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

    def __init__(self, error=None):
        super().__init__("pyiqa")
        self.error, self.asked = error, []

    def create_metric(self, name, device, as_loss):
        if self.error:
            raise self.error
        self.asked.append(name)

        class Metric(SimpleNamespace):
            def __call__(self, x, y=None):
                assert x.min() >= 0 and x.max() <= 1
                return x.mean((1, 2, 3))[:, None]

        return Metric()


def test_pyiqa_metrics_are_turned_so_that_higher_is_better(monkeypatch, group):
    fake = FakePyiqa()
    monkeypatch.setitem(sys.modules, "pyiqa", fake)
    names = ["musiq", "maniqa", "maniqa-pipal", "niqe-paper", "lpips"]
    rewards = build_rewards(names)
    assert fake.asked == ["musiq", "maniqa", "maniqa-pipal", "niqe", "lpips"]
    assert [r.kind for r in rewards] == ["perceptual"] * 4 + ["fidelity"]
    want = (group[0] / 2 + 0.5).mean((2, 3, 4))
    for r, sign in zip(rewards, (1, 1, 1, -1, -1)):
        torch.testing.assert_close(r.score(*group), sign * want)


def test_a_name_means_one_thing_and_old_names_are_told(monkeypatch, group):
    monkeypatch.setitem(sys.modules, "pyiqa", FakePyiqa())
    assert build_rewards(["maniqa-koniq"])[0].name == "maniqa"
    with pytest.raises(ValueError, match="reward 'niqe' is called 'niqe-32' now"):
        build_rewards(["niqe"])
    columns, _ = build_metrics(["niqe-32", "vgg", "maniqa-koniq"], "photos", torch.device("cpu"))
    assert [c.name for c in columns if c.name != "vgg"] == ["niqe-32", "maniqa"]
    x, y = group[0][0, :1] / 2 + 0.5, group[1][:1] / 2 + 0.5
    (reward,) = build_rewards(["niqe-32"])
    assert float(columns[0].score(x, y)) == pytest.approx(-float(reward.score(*group)[0, 0]), rel=1e-6)
    with pytest.raises(ValueError, match="'region_detail' compares the samples of a group"):
        build_metrics(["region_detail"], "photos", torch.device("cpu"))


def test_missing_pyiqa_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(Unavailable, match=r"reward 'musiq': pyiqa cannot be imported .*gdpo-sr\[iqa\]"):
        build_rewards(["psnr_y", "musiq"])


def test_missing_weights_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", FakePyiqa(error=OSError("no route to host")))
    with pytest.raises(Unavailable, match=r"reward 'maniqa': pyiqa could not load maniqa .*no route"):
        build_rewards(["maniqa"])
