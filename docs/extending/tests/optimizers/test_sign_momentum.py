"""SignMomentum against its formula, through a checkpoint, and from a YAML."""

from __future__ import annotations

import copy

import torch

from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.optimizers.sign_momentum import SignMomentum

TARGET = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def train(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (weight - TARGET).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()


def new_weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))


def test_steps_follow_the_formula() -> None:
    weight = new_weight()
    train(weight, SignMomentum([weight], lr=0.1, momentum=0.8), 30)
    x, v = [0.0] * 3, [0.0] * 3
    for _ in range(30):
        for i, target in enumerate(TARGET.tolist()):
            v[i] = 0.8 * v[i] + 0.2 * 2.0 * (x[i] - target)
            x[i] -= 0.1 * (v[i] > 0) - 0.1 * (v[i] < 0)
    assert torch.allclose(weight.data, torch.tensor(x, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_loaded_optimizer_continues_bitwise() -> None:
    weight = new_weight()
    optimizer = SignMomentum([weight], lr=0.1)
    train(weight, optimizer, 5)
    saved = copy.deepcopy((weight.data, optimizer.state_dict()))
    train(weight, optimizer, 5)
    resumed = torch.nn.Parameter(saved[0])
    other = SignMomentum([resumed], lr=0.1)
    other.load_state_dict(saved[1])
    train(resumed, other, 5)
    assert torch.equal(resumed, weight)


def test_a_yaml_names_it() -> None:
    path = "lightning_ema_nesterov.optimizers.sign_momentum.SignMomentum"
    spec = {"class_path": path, "init_args": {"lr": 0.5}}
    optimizer = build_optimizer(spec, [new_weight()], key="base")
    assert type(optimizer) is SignMomentum
