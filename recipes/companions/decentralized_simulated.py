"""Ten agents with one class of scikit-learn's digits each, simulated in one process.

    pip install 'lightning-ema-nesterov[companions]'
    python recipes/companions/decentralized_simulated.py

Softmax regression with weight decay, whose optimum L-BFGS finds. In each round of FSPDA one random
pair of agents exchanges a tenth of the coordinates; DoCoM's agents are on a ring and send the
largest twentieth of theirs. It takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from lightning_ema_nesterov.companions.decentralized import Topology
from lightning_ema_nesterov.companions.decentralized.simulate import (
    simulate_docom,
    simulate_sa,
    simulate_storm,
)

NUM_AGENTS, NUM_PIXELS, WEIGHT_DECAY = 10, 64, 1e-3
SIZE = NUM_PIXELS * NUM_AGENTS + NUM_AGENTS


class SortedDigits:
    """The digits, as many of each class, and what agents compute on theirs; in float64."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float64) / 16
        labels = torch.tensor(digits.target)
        self.num_images = int(labels.bincount().min())
        self.images = torch.stack([images[labels == c][: self.num_images] for c in range(10)])
        self.optimum = self._minimum()

    def loss(self, vector: Tensor) -> Tensor:
        """Return the mean loss over all agents at one vector, of shape ``(650,)``."""
        weight, bias = vector[:640].view(NUM_PIXELS, 10), vector[640:]
        targets = torch.arange(10).repeat_interleave(self.num_images)
        error = functional.cross_entropy(self.images.flatten(0, 1) @ weight + bias, targets)
        return error + WEIGHT_DECAY / 2 * vector.square().sum()

    def gradients(self, batch_size: int | None, seed: int) -> Callable[[Tensor, int], Tensor]:
        """Return each agent's gradient as a function of points and round, on batches or on all."""

        def gradients(points: Tensor, round_idx: int) -> Tensor:
            images = self.images
            if batch_size is not None:
                generator = torch.Generator().manual_seed(1_000_003 * seed + round_idx)
                shape = (NUM_AGENTS, batch_size)
                chosen = torch.randint(self.num_images, shape, generator=generator)
                images = images[torch.arange(NUM_AGENTS)[:, None], chosen]
            weights = points[:, :640].view(NUM_AGENTS, NUM_PIXELS, 10)
            errors = torch.softmax(torch.baddbmm(points[:, None, 640:], images, weights), dim=-1)
            errors[torch.arange(NUM_AGENTS), :, torch.arange(NUM_AGENTS)] -= 1
            errors /= images.shape[1]
            weight_gradients = torch.bmm(images.transpose(1, 2), errors).flatten(1)
            gradients = torch.cat([weight_gradients, errors.sum(1)], dim=1)
            return gradients + WEIGHT_DECAY * points

        return gradients

    def gaps(self, points: Tensor) -> tuple[float, float]:
        """Return how far above the optimum the loss is: at the mean, and at the worst agent."""
        worst = max(float(self.loss(point)) for point in points)
        return float(self.loss(points.mean(0))) - self.optimum, worst - self.optimum

    def _minimum(self) -> float:
        vector = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [vector],
            max_iter=2000,
            tolerance_grad=1e-12,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(vector)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        return float(self.loss(vector).detach())


def run(
    digits: SortedDigits, method: str, batch_size: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the last points, and the duals or DoCoM's trackers.

    Args:
        digits: The data.
        method: ``"dsgd"``, ``"sa"``, ``"storm"`` or ``"docom"``.
        batch_size: Images of each agent in a round; ``None`` for all. DoCoM takes two gradients on
            half of it.
        seed: Of images, edges and coordinates.
    """
    start = torch.zeros(NUM_AGENTS, SIZE, dtype=torch.float64)
    if method == "docom":
        return simulate_docom(
            digits.gradients(batch_size and batch_size // 2, seed),
            start,
            Topology.ring(NUM_AGENTS),
            num_steps=4_000,
            lr=0.3,
            share=0.05,
            consensus_step_size=0.2,
            momentum_weight=0.01,
        )
    simulate = simulate_storm if method == "storm" else simulate_sa
    is_dsgd = method == "dsgd"
    return simulate(
        digits.gradients(batch_size, seed),
        start,
        Topology.complete(NUM_AGENTS, one_edge_per_round=True),
        num_steps=20_000,
        lr=0.1,
        share=0.1,
        consensus_step_size=0.5,
        dual_step_size=0.0 if is_dsgd else 3e-3,
        dual_growth=0.0 if is_dsgd else 1.0,
        seed=seed,
    )


def main() -> None:
    """Run all methods, and print how far from the optimum they end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    digits = SortedDigits()
    print(f"optimum {digits.optimum:.6f}")
    print("method  images per step  gap of the mean  of the worst agent")
    cases = [("dsgd", None), ("sa", None), ("dsgd", 8), ("sa", 8), ("storm", 8), ("docom", 8)]
    for method, batch_size in cases:
        start = time.monotonic()
        points, vectors = run(digits, method, batch_size, seed)
        mean, worst = digits.gaps(points)
        note = "" if method == "docom" else f", sum of duals {vectors.sum(0).abs().max():.0e}"
        print(
            f"{method:7} {batch_size or 'all':>15}  {mean:15.1e}  {worst:18.1e}"
            f"   ({time.monotonic() - start:.0f} s{note})",
            flush=True,
        )


if __name__ == "__main__":
    main()
