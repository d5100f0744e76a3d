"""LoRA-Pre: the regression that its factors solve, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.optimizers import LoRAPre, groups_by_role
from lightning_ema_nesterov.optimizers.factors import new_factors, product, update_factors_
from tests.optimizers.tiny import HIDDEN, WIDTH, TinyLM, state_elements, train

P, Q, R = 10, 7, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_factors_move_by_the_normal_equations() -> None:
    left, right, g = random(P, R), random(R, Q, seed=1), random(P, Q, seed=2)
    step = 1.0 - 0.9**0.5
    new_left = (1 - step) * left + step * g @ right.T @ torch.inverse(right @ right.T)
    new_right = (1 - step) * right + step * torch.inverse(left.T @ left) @ left.T @ g
    update_factors_(left, right, g, decay=0.9)
    # The gauge differs, the product does not; the ridge is 1e-16 of the squares.
    torch.testing.assert_close(product(left, right), new_left @ new_right, rtol=0, atol=1e-12)


def test_product_does_not_depend_on_the_gauge() -> None:
    left, right, mixing = random(P, R), random(R, Q, seed=1), random(R, R, seed=2)
    other_left, other_right = left @ mixing, torch.linalg.solve(mixing, right)
    for step_idx in range(20):
        g = random(P, Q, seed=10 + step_idx)
        update_factors_(left, right, g, decay=0.9)
        update_factors_(other_left, other_right, g, decay=0.9)
    difference = product(left, right) - product(other_left, other_right)
    # Twenty inverses of random 3 x 3 systems.
    assert float(difference.abs().max()) < 1e-9


def test_it_is_the_moving_average_inside_the_subspace() -> None:
    basis, coordinates = torch.linalg.qr(random(P, R)).Q, torch.linalg.qr(random(Q, R, seed=1)).Q
    core = random(R, R, seed=2)
    average = basis @ core @ coordinates.T
    left, right = basis @ core, coordinates.T.clone()
    decay = 0.99
    worst = 0.0
    for step_idx in range(100):
        # The gradients stay near the average and in its row and column space.
        g = basis @ (core + 0.3 * random(R, R, seed=10 + step_idx)) @ coordinates.T
        update_factors_(left, right, g, decay=decay)
        average = decay * average + (1 - decay) * g
        worst = max(worst, float((product(left, right) - average).norm() / average.norm()))
    # One step deviates by h^2 = (1 - sqrt(decay))^2 = 2.5e-5 of the gradient, in 100 steps by
    # about their sum at most.
    assert worst < 2.5e-3
    zero = float((basis @ core @ coordinates.T - average).norm() / average.norm())
    assert zero > 10 * worst  # the average moved by far more


def test_decay_of_the_product_is_that_of_the_average() -> None:
    left, right = random(P, R), random(R, Q, seed=1)
    before = product(left, right)
    update_factors_(left, right, torch.zeros(P, Q, dtype=torch.float64), decay=0.81)
    torch.testing.assert_close(product(left, right), 0.81 * before, rtol=1e-10, atol=1e-12)


def test_one_sided_components_come_at_half_the_rate_and_others_not_at_all() -> None:
    left, right = torch.eye(P, R, dtype=torch.float64), torch.eye(R, Q, dtype=torch.float64)
    g = torch.zeros(P, Q, dtype=torch.float64)
    g[:R, :R] = torch.eye(R)
    g[P - 1, 0] = 1.0  # in the row space only
    g[P - 1, Q - 1] = 1.0  # in neither
    update_factors_(left, right, g, decay=0.98)
    taken = product(left, right)
    assert float(taken[P - 1, 0]) == pytest.approx(0.01, rel=0.02)
    assert abs(float(taken[P - 1, Q - 1])) < 1e-12


def test_start_does_not_die() -> None:
    left, right = new_factors((P, Q), R, seed=0, like=random(1))
    torch.testing.assert_close(right @ right.T, torch.eye(R, dtype=torch.float64))
    assert not left.any()
    for _ in range(3000):  # zeros first, as with a rate of 0 or a layer that starts at 0
        update_factors_(left, right, torch.zeros(P, Q, dtype=torch.float64), decay=0.5)
    g = random(P, R, seed=3) @ random(R, Q, seed=4)
    for _ in range(600):  # the last components come at half the rate: 0.95^600 is 4e-14
        update_factors_(left, right, g, decay=0.9)
    torch.testing.assert_close(product(left, right), g, rtol=0, atol=1e-6)


def test_dead_factors_come_back() -> None:
    left, right = torch.zeros(P, R), torch.zeros(R, Q)
    g = torch.randn(P, Q, generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        update_factors_(left, right, g, decay=0.9)
    assert product(left, right).isfinite().all()
    assert float(product(left, right).norm()) > 0.3 * float(g.norm())


def test_ill_conditioned_factors_stay_finite_in_float32() -> None:
    left, right = torch.randn(P, R), torch.randn(R, Q)
    left[:, 2] = left[:, 1] * (1 + 1e-7)
    for step_idx in range(50):
        g = torch.randn(P, Q, generator=torch.Generator().manual_seed(step_idx))
        update_factors_(left, right, g, decay=0.9)
        assert product(left, right).isfinite().all()
        assert float(product(left, right).norm()) < 10 * float(g.norm())


def test_adam_steps_match_the_mathematics() -> None:
    beta1, beta2, eps, lr, decay = 0.9, 0.95, 1e-8, 0.01, 0.1
    p = nn.Parameter(random(P, Q))
    optimizer = LoRAPre([{"params": [p], "role": "hidden"}], lr=lr, rank=R, weight_decay=decay)
    w = p.detach().clone()
    for t in range(1, 16):
        g = p.grad = random(P, Q, seed=t)
        state = optimizer.state[p]
        if t == 1:
            m_low = v_low = torch.zeros(P, Q, dtype=torch.float64)
        else:
            m_low = state["first_left"] @ state["first_right"]
            v_low = state["second_left"] @ state["second_right"]
        optimizer.step()
        m = beta1 * m_low + (1 - beta1) * g
        v = beta2 * v_low**2 + (1 - beta2) * g**2
        rate = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        w = (1 - lr * decay) * w - rate * m / (v.sqrt() + eps)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)


def test_factors_follow_gradients_and_their_absolute_values() -> None:
    p = nn.Parameter(torch.zeros(P, Q, dtype=torch.float64))
    optimizer = LoRAPre([{"params": [p], "role": "hidden"}], rank=Q, betas=(0.9, 0.9))
    g = random(P, Q)
    for _ in range(300):
        p.grad = g
        optimizer.step()
    state = optimizer.state[p]
    first = state["first_left"] @ state["first_right"]
    second = state["second_left"] @ state["second_right"]
    torch.testing.assert_close(first, g, rtol=0, atol=1e-4)
    torch.testing.assert_close(second, g.abs(), rtol=0, atol=1e-4)


def test_muon_form_moves_by_an_orthogonal_matrix() -> None:
    p = nn.Parameter(torch.zeros(12, 4, dtype=torch.float64))
    optimizer = LoRAPre([{"params": [p], "role": "hidden"}], lr=1.0, rank=2, form="muon")
    p.grad = random(12, 4)
    optimizer.step()
    values = torch.linalg.svdvals(p.detach()) / 3**0.5  # times sqrt(12 / 4)
    # Muon's iteration leaves the singular values between about 0.7 and 1.2.
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(random(12, 4), full_matrices=False)
    aligned = (left @ right * p.detach()).sum() / (p.detach().norm() * 2)
    assert float(-aligned) > 0.95


@pytest.mark.parametrize(("form", "num_moments"), [("adam", 2), ("muon", 1)])
def test_state_is_thin_and_in_float32(form: str, num_moments: int) -> None:
    model = TinyLM(dtype=torch.bfloat16)
    optimizer = LoRAPre(groups_by_role(model), rank=3, form=form)
    train(model, optimizer, 2)
    for p in (model.up.weight, model.down.weight):
        assert state_elements(optimizer, p) == num_moments * (HIDDEN + WIDTH) * 3
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}


def test_unknown_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="form must be 'adam' or 'muon', got 'sgd'"):
        LoRAPre(groups_by_role(TinyLM()), rank=3, form="sgd")
