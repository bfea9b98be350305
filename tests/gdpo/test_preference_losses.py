"""Each algorithm's loss against its paper's formula, written out in numpy, float64, sample by sample."""

import inspect
import math

import numpy as np
import pytest
import torch

from gdpo.scores.group import Judged
from gdpo.train.config import GDPOConfig
from gdpo.train.losses import preference
from gdpo.train.methods.gdpo import GDPO, Predictions

B, G, SHAPE, BETA = 3, 6, (4, 5, 7), 500.0


def drawn(seed=0, policy_differs=True):
    """Predictions [B,G,...] that differ as a policy's and its reference's do; rewards in [0,1] and their advantage."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((B, G, *SHAPE))
    reference = noise + 0.3 * rng.standard_normal(noise.shape)
    policy = reference + 0.02 * policy_differs * rng.standard_normal(noise.shape)
    reward = rng.random((B, G))
    advantage = (reward - reward.mean(1, keepdims=True)) / reward.std(1, ddof=1, keepdims=True)
    return policy, noise, reference, reward, advantage


def log_likelihood(policy, noise, reference):
    """log p_policy / p_reference of one sample: Diffusion-DPO's one-step bound."""
    return -BETA / 2 * (((policy - noise) ** 2).mean() - ((reference - noise) ** 2).mean())


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def by_sample(policy, noise, reference):
    return np.array([[log_likelihood(policy[b, g], noise[b, g], reference[b, g]) for g in range(G)] for b in range(B)])


def grpo(policy, noise, reference, reward, advantage):
    total = 0.0
    for b in range(B):
        for g in range(G):
            q, a = math.exp(log_likelihood(policy[b, g], noise[b, g], reference[b, g])), advantage[b, g]
            clipped = min(max(q, 0.8), 1.2)
            total += min(q * a, clipped * a) - 0.04 * (1 / q - math.log(1 / q) - 1)
    return -total / (B * G)


def nft(policy, noise, reference, reward, advantage):
    total, s = 0.0, 0.7
    for b in range(B):
        for g in range(G):
            o = 0.5 + 0.5 * min(max(advantage[b, g], -1), 1)
            for share, sign in ((o, 1), (1 - o, -1)):
                mirrored = (1 - sign * s) * reference[b, g] + sign * s * policy[b, g]
                error = mirrored - noise[b, g]
                total += share * (error**2).mean() / nft.scale(error)
    return total / (B * G)


nft.scale = lambda error: abs(error).mean()


def diffusion_dpo(policy, noise, reference, reward, advantage):
    l = by_sample(policy, noise, reference)
    return -np.mean([log_sigmoid(l[b, reward[b].argmax()] - l[b, reward[b].argmin()]) for b in range(B)])


def dp2o(policy, noise, reference, reward, advantage, n=2, mean_spread=0.25):
    l, total = by_sample(policy, noise, reference), 0.0
    for b in range(B):
        order = np.argsort(-reward[b])
        pairs = [(w, k) for w in order[:n] for k in order[-n:]]
        mean_gap = np.mean([abs(reward[b, w] - reward[b, k]) for w, k in pairs])
        inter = reward[b].std(ddof=1) + (1 - mean_spread)
        for w, k in pairs:
            intra = abs(reward[b, w] - reward[b, k]) + (1 - mean_gap)
            total -= intra * inter * log_sigmoid(l[b, w] - l[b, k]) / len(pairs)
    return total / B


def ours(name, policy, noise, reference, reward, advantage, weight=None):
    """The project's, in the precision of its arguments, on what `_kept` keeps."""
    seen = (policy, noise, reference)
    if name == "grpo":
        return preference.grpo_loss(*seen, advantage, beta=BETA, epsilon=0.2, kl=0.04, weight=weight)
    if name == "nft":
        return preference.nft_loss(*seen, advantage, beta=BETA, strength=0.7, weight=weight)
    n = 1 if name == "diffusion_dpo" else 2
    order = reward.argsort(dim=1, descending=True)
    keep = torch.cat([order[:, :n], order[:, -n:]], 1)
    seen = tuple(x[torch.arange(B)[:, None], keep] for x in seen)
    kept = reward.gather(1, keep)
    if name == "diffusion_dpo":
        return preference.diffusion_dpo_loss(*seen, kept, beta=BETA, weight=weight)
    return preference.dp2o_loss(*seen, kept, reward.std(1), beta=BETA, mean_spread=0.25, weight=weight)


PAPERS = {"grpo": grpo, "nft": nft, "diffusion_dpo": diffusion_dpo, "dp2o": dp2o}


@pytest.mark.parametrize("name", PAPERS)
def test_loss_is_the_papers_formula(name):
    for seed in range(3):
        case = drawn(seed)
        loss, margin = ours(name, *map(torch.from_numpy, case))
        assert float(loss) == pytest.approx(PAPERS[name](*case), rel=1e-11)
        assert margin.shape == (B,) and margin.abs().max() > 0.05


@pytest.mark.parametrize("name", PAPERS)
def test_gradient_is_the_formulas_slope(name, monkeypatch):
    policy, *others = drawn(5)
    rng = np.random.default_rng(1)
    if name == "nft":  # its adaptive weight is a constant of the gradient: of the point where the slope is taken
        mirrored = (others[1] + 0.7 * sign * (policy - others[1]) for sign in (1, -1))
        errors = [abs(m - others[0]).mean((2, 3, 4)) for m in mirrored]
        scales = np.stack(errors, axis=2).ravel().tolist()
        state = {"i": 0}

        def constant(error):
            state["i"] += 1
            return scales[(state["i"] - 1) % len(scales)]

        monkeypatch.setattr(nft, "scale", constant)
    x = torch.from_numpy(policy).requires_grad_(True)
    ours(name, x, *map(torch.from_numpy, others))[0].backward()
    for _ in range(3):
        direction = rng.standard_normal(policy.shape)
        h = 1e-6
        slope = (PAPERS[name](policy + h * direction, *others) - PAPERS[name](policy - h * direction, *others)) / 2 / h
        assert float((x.grad * torch.from_numpy(direction)).sum()) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", PAPERS)
def test_a_step_raises_the_likelihood_of_what_is_preferred(name):
    """From the reference itself, where policy and reference agree."""
    policy, noise, reference, reward, advantage = map(torch.from_numpy, drawn(3, policy_differs=False))
    x = policy.clone().requires_grad_(True)
    ours(name, x, noise, reference, reward, advantage)[0].backward()
    after = preference.log_ratio(policy - 1e-2 * x.grad, noise, reference, BETA)
    best, worst = reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)
    assert (after.gather(1, best) > 0).all() and (after.gather(1, worst) < 0).all()


@pytest.mark.parametrize("name", PAPERS)
def test_a_uniform_weight_changes_nothing_and_half_a_picture_is_that_half(name):
    case = [torch.from_numpy(x) for x in drawn(2)]
    plain, _ = ours(name, *case)
    assert float(ours(name, *case, weight=torch.full((B, *SHAPE[1:]), 3.0))[0]) == pytest.approx(
        float(plain), rel=1e-12
    )
    half = torch.zeros(B, *SHAPE[1:])
    half[:, :2] = 1
    cut = [x[..., :2, :] for x in case[:3]]
    assert float(ours(name, *case, weight=half)[0]) == pytest.approx(float(ours(name, *cut, *case[3:])[0]), rel=1e-12)


@pytest.mark.parametrize("name", ["diffusion_dpo", "dp2o"])
def test_samples_that_tie_teach_nothing(name):
    policy, noise, reference, reward, advantage = map(torch.from_numpy, drawn(4))
    x = policy.clone().requires_grad_(True)
    loss, margin = ours(name, x, noise, reference, torch.full_like(reward, 0.5), advantage * 0)
    loss.backward()
    assert not margin.any() and not x.grad.any()


@pytest.mark.parametrize("fault", ["0.02 of the clip", "biased spread", "sum of pairs"])
def test_planted_faults_are_seen(fault):
    case = drawn(0)
    tensors = [torch.from_numpy(x) for x in case]
    if fault == "0.02 of the clip":
        wrong = preference.grpo_loss(*tensors[:3], tensors[4], beta=BETA, epsilon=0.22, kl=0.04)[0]
        right = grpo(*case)
    else:
        right = dp2o(*case) if fault == "biased spread" else dp2o(*case, n=1)
        biased = tensors[3].std(1, correction=0) if fault == "biased spread" else tensors[3].std(1)
        order = tensors[3].argsort(dim=1, descending=True)
        keep = torch.cat([order[:, :2], order[:, -2:]], 1)
        seen = [x[torch.arange(B)[:, None], keep] for x in tensors[:3]]
        wrong = preference.dp2o_loss(*seen, tensors[3].gather(1, keep), biased, beta=BETA, mean_spread=0.25)[0]
    assert abs(float(wrong) - right) > 1e-6 * abs(right)


def test_an_algorithm_without_a_loss_is_not_taken_for_another():
    judged = Judged({}, *[torch.zeros(B, G)] * 2, *[torch.zeros(B)] * 2, torch.zeros(B, 8, 8), None)
    method = GDPO.__new__(GDPO)
    method.config = GDPOConfig(algorithm="other")
    assert method._kept(judged.reward) is None
    with pytest.raises(AssertionError, match="other"):
        method._compare(Predictions(*[torch.zeros(B, G, 1, 2, 2)] * 3), judged, None)


def test_each_algorithm_of_the_options_has_its_loss():
    (choices,) = [a.__args__ for a in [inspect.get_annotations(GDPOConfig, eval_str=True)["algorithm"]]]
    assert set(choices) == {"gdpo", *PAPERS}
    with pytest.raises(ValueError, match=r"num_pairs must be 1 to 2 \(half a group\); got 3"):
        config = GDPOConfig(algorithm="dp2o", num_generations=5, num_pairs=3)
        config.model.pretrained = "folder"
        config.validate()
