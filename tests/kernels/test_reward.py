"""attribute_reward: against plain Python, ties, and the fused kernel against fp64."""

import statistics as plain_statistics

import pytest
import torch

from gdpo.kernels import attribute_reward, reward
from tests.support.fused import DEVICE, assert_as_good, mutant, poisoned, strided


def problem(b=3, g=6, f=1, p=2, seed=0):
    torch.manual_seed(seed)
    fidelity, perceptual = 25 + 3 * torch.randn(b, g, f), 60 + 8 * torch.randn(b, g, p)
    smooth = torch.rand(b)
    return [x.to(DEVICE) for x in (fidelity, perceptual, smooth, 1 - smooth)]


def check(args, function=attribute_reward):
    exact = attribute_reward(*(x.double() for x in args), backend="torch")
    plain = attribute_reward(*args, backend="torch")
    with poisoned():
        fused = function(*args, backend="triton")
    assert_as_good(fused, plain, exact)


def in_python(fidelity, perceptual, smooth, texture):
    """One picture, lists of lists [metric][sample]."""

    def score(metrics):
        scaled = [
            [(v - min(m)) / (max(m) - min(m)) if max(m) > min(m) else 0.0 for v in m] for m in metrics
        ]  # fmt: skip
        return [sum(column) / len(scaled) for column in zip(*scaled)]

    rewards = [smooth * a + texture * b for a, b in zip(score(fidelity), score(perceptual))]
    mean, spread = plain_statistics.fmean(rewards), plain_statistics.stdev(rewards)
    return [(r - mean) / (spread + 1e-8) for r in rewards]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("g, f, p", [(2, 1, 1), (2, 3, 2), (3, 1, 2), (6, 1, 2), (9, 2, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_papers_words(backend, g, f, p, seed):
    fidelity, perceptual, smooth, texture = problem(2, g, f, p, seed)
    fidelity[:, :, 0] = fidelity[:, :, 0].round()  # ties between some
    advantage = attribute_reward(fidelity, perceptual, smooth, texture, backend=backend)
    for b in range(2):
        expected = in_python(fidelity[b].T.tolist(), perceptual[b].T.tolist(), float(smooth[b]), float(texture[b]))
        assert advantage[b].tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_count_within_their_kind(backend):
    fidelity, perceptual, smooth, texture = problem(2, 5, 2, 3)
    integers = [torch.tensor(w, device=DEVICE) for w in ([3, 1], [1, 2, 2])]  # weight 2: there twice
    repeated = [m.repeat_interleave(w, dim=2) for m, w in zip((fidelity, perceptual), integers)]
    expected = attribute_reward(*repeated, smooth, texture, backend="torch")
    weights = [w.float() for w in integers]
    found = attribute_reward(
        fidelity, perceptual, smooth, texture,
        fidelity_weights=weights[0], perceptual_weights=weights[1], backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    unweighted = attribute_reward(fidelity, perceptual, smooth, texture, backend=backend)
    assert (found - unweighted).abs().max() > 0.05


def test_weights_are_checked():
    fidelity, perceptual, smooth, texture = problem(2, 5, 2, 3)
    with pytest.raises(ValueError, match="fidelity_weights"):
        attribute_reward(fidelity, perceptual, smooth, texture, fidelity_weights=torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="perceptual_weights"):
        attribute_reward(fidelity, perceptual, smooth, texture, perceptual_weights=torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("shape", [(1, 6, 1, 2), (16, 16, 3, 1), (5, 2, 1, 1), (4, 7, 0, 3), (4, 7, 5, 0)])
def test_fused_is_as_good_as_torch(shape):
    check(problem(*shape))


def test_any_order_in_memory():
    fidelity, perceptual, smooth, texture = problem()
    check([strided(fidelity), perceptual.transpose(0, 1).contiguous().transpose(0, 1), strided(smooth), texture])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_count_nothing(backend):
    fidelity, perceptual, smooth, texture = problem()
    fidelity[0], perceptual[0] = 30.0, 0.1  # everything ties
    fidelity[1] = 30.0  # one metric ties: the others decide alone
    advantage = attribute_reward(fidelity, perceptual, smooth, texture, backend=backend)
    assert torch.equal(advantage[0], torch.zeros_like(advantage[0]))
    alone = attribute_reward(fidelity[:, :, :0], perceptual, smooth, texture, backend=backend)
    torch.testing.assert_close(advantage[1], alone[1])
    assert advantage.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("g", [2, 3, 6, 7, 11])
def test_rewards_that_tie_by_compensation_give_zero(backend, g):
    """Rewards all 0.3: the rounding of their mean must not be blown up by 1 / (std + 1e-8)."""
    fidelity = torch.zeros(1, g, 1, device=DEVICE)
    fidelity[0, ::2] = 1
    share = torch.full((1,), 0.3, device=DEVICE)
    advantage = attribute_reward(fidelity, 1 - fidelity, share, share, backend=backend)
    assert not advantage.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_standardised_and_the_same_bits_twice(backend):
    args = problem(8, 6, 2, 2)
    advantage = attribute_reward(*args, backend=backend)
    assert advantage.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(advantage.std(1), torch.ones(8, device=DEVICE))
    assert torch.equal(advantage, attribute_reward(*args, backend=backend))


def test_without_a_fault_the_copy_passes(tmp_path):
    check(problem(), mutant(reward, "EPSILON = 1e-8", "EPSILON = 1e-8", tmp_path).attribute_reward)


@pytest.mark.parametrize(
    "old, new",
    [
        ("centred * centred, 0.0)) / (group - 1)", "centred * centred, 0.0)) / (group)"),
        ("reward += texture *", "reward += smooth *"),
        ('tl.where(inside, x, float("inf"))', "x"),
        ("centred -= tl.sum(tl.where(inside, centred, 0.0))", "centred -= tl.sum(centred)"),
    ],
)
def test_a_planted_fault_is_seen(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check(problem(), mutant(reward, old, new, tmp_path).attribute_reward)
