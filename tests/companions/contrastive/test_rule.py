"""Chains and gradient against the rule written out, and what a chain converges to."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from companions.contrastive.emc2_reference import Chains, Point, cosine
from torch import Tensor, nn

from lightning_ema_nesterov.companions.contrastive import EMC2Loss, contrastive_loss
from lightning_ema_nesterov.companions.contrastive.chains import log_draws, run_chains

NUM_SAMPLES = 9
TEMPERATURE = 0.1
# With repeats from batch to batch, and one sample that is twice in a batch.
BATCHES = ([4, 0, 7], [1, 4, 8], [7, 4, 1], [2, 3, 2], [0, 2, 8], [4, 3, 5])
Regime = Literal["image", "view"]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


IMAGES = draw(NUM_SAMPLES, 6, seed=0)
NOISE = 0.3 * draw(2, NUM_SAMPLES, 6, seed=1)


class Setup:
    """An encoder, and a loss with what it is asked to encode."""

    def __init__(self, chains: Regime, burn_in: float) -> None:
        self.chains = chains
        self.encoder = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.encoder.weight.copy_(draw(4, 6, seed=2))
        self.loss = EMC2Loss(NUM_SAMPLES, TEMPERATURE, burn_in, chains=chains, seed=3).double()

    def inside(self, samples: Tensor, views: Tensor) -> Tensor:
        features: Tensor = self.encoder(IMAGES[samples] + NOISE[views, samples])
        return features

    def outside(self, samples: Tensor, views: Tensor) -> Tensor:
        """One chain per image: the image without augmentation."""
        if self.chains == "view":
            return self.inside(samples, views)
        features: Tensor = self.encoder(IMAGES[samples])
        return features

    def gradient(self, batch: list[int]) -> tuple[float, Tensor]:
        samples = torch.tensor(batch)
        out0, out1 = (self.inside(samples, torch.full_like(samples, v)) for v in range(2))
        value = self.loss(out0, out1, samples, self.outside)
        (gradient,) = torch.autograd.grad(value, self.encoder.weight)
        return float(value.detach()), gradient


def expected_gradient(
    setup: Setup, reference: Chains, batch: list[int], step: int
) -> tuple[float, Tensor]:
    """One anchor after another; the draws are those of the package, tested by themselves."""
    samples = torch.arange(NUM_SAMPLES)
    inside, outside = (
        torch.stack([encode(samples, torch.full_like(samples, view)) for view in range(2)])
        for encode in (setup.inside, setup.outside)
    )
    anchors = [(view, sample) for view in range(2) for sample in batch]
    numbers = torch.tensor([view * NUM_SAMPLES + sample for view, sample in anchors])
    logs = log_draws(numbers, len(anchors), torch.tensor(step + 3 * 2**32)).double().exp()
    draws = dict(zip(anchors, logs.tolist(), strict=True))

    def as_lists(features: Tensor) -> dict[Point, list[float]]:
        return {(v, i): features[v, i].tolist() for v in range(2) for i in range(NUM_SAMPLES)}

    kept = reference.visit(batch, as_lists(inside), as_lists(outside), draws)
    terms = []
    for view, sample in anchors:
        states = [
            (inside if is_in_batch else outside)[state] for state, is_in_batch in kept[view, sample]
        ]
        x, y = inside[view, sample], inside[1 - view, sample]
        negative = torch.stack([torch.cosine_similarity(x, z, dim=0) for z in states]).mean()
        terms.append(negative - torch.cosine_similarity(x, y, dim=0))
    value = torch.stack(terms).mean() / TEMPERATURE
    (gradient,) = torch.autograd.grad(value, setup.encoder.weight)
    return float(value.detach()), gradient


@pytest.mark.parametrize("burn_in", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("chains", ["image", "view"])
def test_chains_and_gradients_follow_the_rule(chains: Regime, burn_in: float) -> None:
    setup = Setup(chains, burn_in)
    reference = Chains(TEMPERATURE, burn_in, per_view=chains == "view")
    num_old = 0
    for step, batch in enumerate(b for b in BATCHES if len(set(b)) == len(b)):
        before = setup.loss.points.clone()
        value, gradient = setup.gradient(batch)
        expected_value, expected = expected_gradient(setup, reference, batch, step)
        # Sums in another order.
        assert value == pytest.approx(expected_value, rel=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        for (view, sample), state in reference.states.items():
            assert int(setup.loss.points[view, sample]) == state[0] * NUM_SAMPLES + state[1]
            stored = float(setup.loss.log_scores[view, sample])
            assert stored == pytest.approx(reference.scores[view, sample], rel=1e-12)
        num_old += int(((before == setup.loss.points) & (before >= 0))[:, batch].sum())
    assert num_old > 0  # some chain kept a state from before, which had to be encoded again


def test_regimes_differ() -> None:
    gradients = []
    regimes: tuple[Regime, ...] = ("image", "view")
    for chains in regimes:
        setup = Setup(chains, 0.5)
        gradients.append([setup.gradient(batch)[1] for batch in BATCHES][-1])
    assert not torch.equal(*gradients)


def test_kept_states_of_a_long_pass_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 0.5, 1.0, 2.5, -1.0], dtype=torch.float64)
    num_rounds, num_anchors = 4000, 8
    columns = torch.randint(5, (num_rounds,), generator=torch.Generator().manual_seed(0))
    draws = log_draws(torch.arange(num_anchors), num_rounds, torch.tensor(0)).double()
    run = run_chains(
        logits[columns].repeat(num_anchors, 1),
        torch.ones(num_anchors, num_rounds, dtype=torch.bool),
        torch.full((num_anchors,), num_rounds),
        torch.full((num_anchors,), -torch.inf, dtype=torch.float64),
        draws,
        burn_in=0.1,
    )
    shares = torch.zeros(5, dtype=torch.float64)
    shares.index_add_(0, columns, run.weights[:, :-1].mean(dim=0))
    # 29,000 draws that depend on each other over about five: a deviation of about .007.
    torch.testing.assert_close(shares, logits.softmax(dim=0), rtol=0, atol=0.02)
    assert (shares - 0.2).abs().max() > 0.3  # not uniform, as the candidates are


def test_draws_are_uniform_and_differ_by_anchor_column_and_step() -> None:
    draws = log_draws(torch.arange(300), 200, torch.tensor(5)).exp()
    counts = torch.histc(draws, bins=20, min=0.0, max=1.0)
    # Chi-squared with 19 degrees of freedom: above 43.8 once in a thousand.
    assert float((counts - 3000).square().sum() / 3000) < 43.8
    assert len(set(draws.flatten().tolist())) > 59_000  # of 60,000, with 24 bits
    later = log_draws(torch.arange(300), 200, torch.tensor(6)).exp()
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]), (draws, later)):
        # Deviation 1/sqrt(60,000) = .004.
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def test_a_sample_twice_in_a_batch_is_no_negative_of_itself() -> None:
    setup = Setup("view", 0.0)
    setup.gradient([2, 3, 2])
    states = setup.loss.points[:, [2, 3]] % NUM_SAMPLES
    assert states.tolist() == [[3, 2], [3, 2]]


def test_mean_gradient_of_negatives_is_nearer_to_the_softmax_of_all_than_in_batch() -> None:
    """With weights that stand still, 20 samples in clusters, batches of 4."""
    temperature, num_samples = 0.15, 20
    images = draw(4, 5, seed=3)[torch.arange(num_samples) % 4] + 0.5 * draw(20, 5, seed=4)
    weight = draw(4, 5, seed=6).requires_grad_()
    features = (images + 0.1 * draw(2, num_samples, 5, seed=5)) @ weight.T

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, weight, retain_graph=True)[0]

    def negatives(out: Tensor, *, positive_in_sum: bool) -> Tensor:
        """What has the gradient of the negatives under the softmax over ``out``."""
        flat = torch.nn.functional.normalize(out.flatten(0, 1), dim=1)
        logits = flat @ flat.T / temperature
        samples = torch.arange(out.shape[1]).repeat(2)
        is_negative = samples.unsqueeze(1) != samples
        is_out = torch.eye(len(flat), dtype=torch.bool) if positive_in_sum else ~is_negative
        shares = logits.detach().masked_fill(is_out, -torch.inf).softmax(dim=1)
        return (shares * logits)[is_negative].sum() / len(flat)

    exact = gradient(negatives(features, positive_in_sum=False))
    loss = EMC2Loss(num_samples, temperature, 0.5, chains="view").double()
    totals = {"emc2": torch.zeros_like(weight), "in-batch": torch.zeros_like(weight)}
    order = torch.Generator().manual_seed(0)
    for pass_idx in range(200):
        for samples in torch.randperm(num_samples, generator=order).chunk(5):
            out = features[:, samples]
            value = loss(out[0], out[1], samples, lambda i, view: features[view, i])
            positives = torch.cosine_similarity(out[0], out[1], dim=1).mean() / temperature
            if pass_idx >= 40:
                totals["emc2"] += gradient(value + positives) / 800
                totals["in-batch"] += gradient(negatives(out, positive_in_sum=True)) / 800
    error = {name: float((m - exact).norm() / exact.norm()) for name, m in totals.items()}
    assert error["emc2"] < 0.25
    assert error["in-batch"] > 0.6


@pytest.mark.parametrize("positive_in_sum", [False, True])
def test_softmax_loss_matches_its_definition(positive_in_sum: bool) -> None:
    out0, out1 = draw(5, 3, seed=5), draw(5, 3, seed=6)
    points = {(0, i): out0[i].tolist() for i in range(5)} | {
        (1, i): out1[i].tolist() for i in range(5)
    }
    total = 0.0
    for view, sample in points:
        x = points[view, sample]
        positive = cosine(x, points[1 - view, sample]) / 0.4
        others = [cosine(x, z) / 0.4 for point, z in points.items() if point[1] != sample]
        others += [positive] if positive_in_sum else []
        total += torch.tensor(others, dtype=torch.float64).exp().sum().log().item() - positive
    value = contrastive_loss(out0, out1, 0.4, positive_in_sum=positive_in_sum)
    assert float(value) == pytest.approx(total / 10, rel=1e-12)
