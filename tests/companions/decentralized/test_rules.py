"""The equations against slow references in float64 that share no code with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.simulate import (
    Gradients,
    simulate_docom,
    simulate_sa,
    simulate_storm,
)
from lightning_ema_nesterov.companions.decentralized.topology import Topology, draw_coordinates

SIZE, SHARE, SEED = 12, 0.25, 5
NUM_DRAWN = 3
# Sums are formed in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}
NUMBERS: dict[str, Any] = {"consensus_step_size": 0.4, "dual_step_size": 0.004, "dual_growth": 0.7}
TOPOLOGIES = [
    Topology.ring(4),
    Topology.complete(4, one_edge_per_round=True),
    Topology.erdos_renyi(5, 0.6, 3),
]


def quadratics(num_agents: int) -> tuple[Gradients, Tensor, Tensor]:
    """Return noisy gradients of ||A_i (x - b_i)||^2 / 2, and the A_i' A_i and b_i."""
    generator = torch.Generator().manual_seed(2)
    roots = torch.randn(num_agents, SIZE, SIZE, generator=generator, dtype=torch.float64) / 4
    matrices = roots @ roots.mT + 0.3 * torch.eye(SIZE, dtype=torch.float64)
    centres = torch.randn(num_agents, SIZE, generator=generator, dtype=torch.float64)

    def gradients(points: Tensor, round_idx: int) -> Tensor:
        noise = torch.Generator().manual_seed(round_idx)
        scale = 1 + 0.1 * torch.randn(points.shape, generator=noise, dtype=torch.float64)
        return torch.einsum("aij,aj->ai", matrices, points - centres) * scale

    return gradients, matrices, centres


def start(num_agents: int) -> Tensor:
    return torch.ones(num_agents, SIZE, dtype=torch.float64)


def dense_laplacian(topology: Topology, round_idx: int) -> Tensor:
    """Return one round's matrix on all agents' coordinates, of shape (n d, n d)."""
    laplacian = torch.zeros(topology.num_agents, SIZE, topology.num_agents, SIZE)
    device = torch.device("cpu")
    for edge_idx in topology.active_edges(SEED, round_idx):
        i, j = topology.edges[edge_idx]
        drawn = draw_coordinates(SIZE, NUM_DRAWN, SEED, round_idx, edge_idx, device)
        assert drawn is not None
        for c in drawn.tolist():
            laplacian[i, c, i, c] += 1
            laplacian[j, c, j, c] += 1
            laplacian[i, c, j, c] -= 1
            laplacian[j, c, i, c] -= 1
    n = topology.num_agents * SIZE
    return laplacian.double().view(n, n)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sa_is_the_papers_rule(topology: Topology) -> None:
    n = topology.num_agents
    gradients, _, _ = quadratics(n)
    x, duals = start(n).flatten(), torch.zeros(n * SIZE, dtype=torch.float64)
    for t in range(60):
        apart = dense_laplacian(topology, t) @ x
        g = gradients(x.view(n, SIZE), t).flatten()
        x, duals = x - 0.1 * g - 0.004 * duals - 0.4 * apart, duals + 0.7 * apart
    points, found = simulate_sa(
        gradients, start(n), topology, num_steps=60, lr=0.1, share=SHARE, seed=SEED, **NUMBERS
    )
    torch.testing.assert_close(points, x.view(n, SIZE), **CLOSE)
    torch.testing.assert_close(found, duals.view(n, SIZE), **CLOSE)
    assert float(found.abs().max()) > 0.01


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_storm_is_the_papers_rule(topology: Topology) -> None:
    n = topology.num_agents
    gradients, _, _ = quadratics(n)
    x = start(n).flatten()
    duals, m_x, m_dual, x_old = (torch.zeros_like(x) for _ in range(4))

    def joint(point: Tensor, t: int) -> tuple[Tensor, Tensor]:
        apart = dense_laplacian(topology, t) @ point
        g = gradients(point.view(n, SIZE), t).flatten()
        return 0.1 * g + 0.004 * duals + 0.4 * apart, apart

    for t in range(60):
        now, apart = joint(x, t)
        old, apart_old = joint(x_old, t)
        m_x = now + (0.8 * (m_x - old) if t else 0.0)
        m_dual = apart + (0.6 * (m_dual - apart_old) if t else 0.0)
        x, x_old, duals = x - m_x, x, duals + 0.7 * m_dual
    points, found = simulate_storm(
        gradients,
        start(n),
        topology,
        num_steps=60,
        lr=0.1,
        share=SHARE,
        seed=SEED,
        primal_weight=0.2,
        dual_weight=0.4,
        **NUMBERS,
    )
    torch.testing.assert_close(points, x.view(n, SIZE), **CLOSE)
    torch.testing.assert_close(found, duals.view(n, SIZE), **CLOSE)


def test_storm_with_weights_one_is_sa() -> None:
    gradients, _, _ = quadratics(4)
    common: dict[str, Any] = {"num_steps": 50, "lr": 0.1, "share": SHARE, "seed": SEED, **NUMBERS}
    sa, _ = simulate_sa(gradients, start(4), TOPOLOGIES[0], **common)
    ends = [
        simulate_storm(
            gradients, start(4), TOPOLOGIES[0], primal_weight=a, dual_weight=a, **common
        )[0]
        for a in (1.0, 0.5)
    ]
    torch.testing.assert_close(ends[0], sa, **CLOSE)
    assert float((ends[1] - sa).abs().max()) > 1e-3


@pytest.mark.parametrize("topology", [Topology.ring(4), Topology.erdos_renyi(5, 0.6, 3)])
def test_docom_is_the_papers_rule(topology: Topology) -> None:
    """With a matrix W and a public copy for everybody, as in the paper."""
    n = topology.num_agents
    gradients, _, _ = quadratics(n)
    degrees = [sum(agent in edge for edge in topology.edges) for agent in range(n)]
    w = torch.zeros(n, n, dtype=torch.float64)
    for i, j in topology.edges:
        w[i, j] = w[j, i] = 1 / (1 + max(degrees[i], degrees[j]))
    w += torch.diag(1 - w.sum(1))

    def keep_largest(rows: Tensor) -> Tensor:
        kept = torch.zeros_like(rows)
        for row, out in zip(rows, kept, strict=True):
            for idx in row.abs().argsort(descending=True)[:NUM_DRAWN]:
                out[idx] = row[idx]
        return kept

    x = start(n)
    hat, tracker_hat = x.clone(), torch.zeros_like(x)
    v = tracker = gradients(x, 0)
    for t in range(1, 61):
        half = x - 0.1 * tracker
        hat = hat + keep_largest(half - hat)
        x_old, x = x, half + 0.3 * (w @ hat - hat)
        if t == 60:
            break
        v_old, v = v, gradients(x, t) + 0.8 * (v - gradients(x_old, t))
        moved = tracker + v - v_old
        tracker_hat = tracker_hat + keep_largest(moved - tracker_hat)
        tracker = moved + 0.3 * (w @ tracker_hat - tracker_hat)
    points, trackers = simulate_docom(
        gradients,
        start(n),
        topology,
        num_steps=60,
        lr=0.1,
        share=SHARE,
        consensus_step_size=0.3,
        momentum_weight=0.2,
    )
    torch.testing.assert_close(points, x, **CLOSE)
    torch.testing.assert_close(trackers, tracker, **CLOSE)
    # The mean of what is tracked is that of the estimates.
    torch.testing.assert_close(trackers.mean(0), v.mean(0), **CLOSE)
    assert float((trackers - v).abs().max()) > 0.1


def exact_gradients(num_agents: int) -> tuple[Gradients, Tensor]:
    """Return gradients without noise, and the minimum of their sum."""
    _, matrices, centres = quadratics(num_agents)
    minimum = torch.linalg.solve(matrices.sum(0), torch.einsum("aij,aj->i", matrices, centres))
    return lambda points, _: torch.einsum("aij,aj->ai", matrices, points - centres), minimum


def test_antisymmetric_dual_is_unbiased_and_that_of_the_public_code_is_not() -> None:
    topology = Topology.complete(4, one_edge_per_round=True)
    gradients, minimum = exact_gradients(4)
    points, duals = simulate_sa(
        gradients,
        start(4),
        topology,
        num_steps=4_000,
        lr=0.1,
        share=SHARE,
        seed=SEED,
        consensus_step_size=0.5,
        dual_step_size=0.01,
    )
    # To rounding: the largest dual is about 10, and 4,000 sums of it were rounded.
    assert float(duals.sum(0).abs().max()) < 1e-11
    assert float((points - minimum).abs().max()) < 1e-9

    x = start(4)
    biased = torch.zeros_like(x)
    for t in range(4_000):
        new = x - 0.1 * gradients(x, t) - 0.01 * biased
        new -= 0.5 * (dense_laplacian(topology, t) @ x.flatten()).view_as(x)
        for edge_idx in topology.active_edges(SEED, t):
            i, j = topology.edges[edge_idx]
            drawn = draw_coordinates(SIZE, NUM_DRAWN, SEED, t, edge_idx, torch.device("cpu"))
            biased[i, drawn] += new[i, drawn] - x[j, drawn]
            biased[j, drawn] += new[j, drawn] - x[i, drawn]
        x = new
    assert float(biased.sum(0).abs().max()) > 0.1
    assert float((x.mean(0) - minimum).abs().max()) > 1e-3


def test_duals_become_the_gradients_at_the_common_solution() -> None:
    gradients, minimum = exact_gradients(4)
    _, duals = simulate_sa(
        gradients,
        start(4),
        Topology.ring(4),
        num_steps=6_000,
        lr=0.1,
        share=SHARE,
        consensus_step_size=0.5,
        dual_step_size=0.01,
    )
    expected = -0.1 / 0.01 * gradients(minimum.repeat(4, 1), 0)
    # The slowest mode is not quite at its end.
    torch.testing.assert_close(duals, expected, rtol=1e-6, atol=1e-6)
