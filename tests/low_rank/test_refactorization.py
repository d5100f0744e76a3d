"""Refactorization in the middle of a run, with the direction on: products and lookahead stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.low_rank import (
    LowRankLinear,
    attach_momentum_reset,
    attach_weight_refactorization,
    refactorization,
    refactorize_,
    to_low_rank_,
)
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY
from lightning_ema_nesterov.rules.gpa import GPADirections
from lightning_ema_nesterov.rules.slow_weights import SlowWeights
from tests.low_rank import reference
from tests.low_rank.toy import LowRankToy, loss_of, rarely, train, weights
from tests.toys import equal, largest_difference, snapshot, through_a_file

BETA, GAMMA, STEPS = 0.6, 0.8, 12
Make = Callable[[Any], Optimizer]


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.3)


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.02, weight_decay=0.1)


def attach(optimizer: Optimizer, model: nn.Module, **kwargs: Any) -> Any:
    settings = {"lookahead_step_size": BETA, "ema_decay": GAMMA, "warmup": 0, "rest": 0, **kwargs}
    return attach_ema_nesterov(optimizer, model, **settings)


def oracle(make: Make, **kwargs: Any) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Weights of the layers at each iterate and at each lookahead point."""
    model = LowRankToy()
    names = [name for name, _ in model.named_parameters()]
    pairs = [(names.index(f"{n}.B"), names.index(f"{n}.A")) for n in ("first", "second")]

    def gradients(params: list[Tensor], t: int) -> tuple[Tensor, ...]:
        class Bound(nn.Module):
            def parameters(self, recurse: bool = True) -> Any:
                return iter(params)

            def forward(self, x: Tensor) -> Any:
                return functional_call(model, dict(zip(names, params, strict=True)), (x,))

        return torch.autograd.grad(loss_of(Bound(), t), params)

    found = reference.train(
        list(model.parameters()),
        gradients,
        make,
        pairs=pairs,
        num_steps=STEPS,
        ema_decay=GAMMA,
        step_size=BETA,
        **kwargs,
    )
    last = names.index("out.weight")
    scales = [layer.scale for layer in model.layers]

    def products(point: list[Tensor]) -> list[Tensor]:
        made = [s * point[b] @ point[a] for s, (b, a) in zip(scales, pairs, strict=True)]
        return [*made, point[last]]

    return [products(x) for x in found[0]], [products(y) for y in found[1]]


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "sgd, refactorized": (sgd, {"refactorize_every": 4, "reset_every": None}),
    "adamw, refactorized and reset": (
        adamw,
        {"refactorize_every": 4, "reset_every": 4, "recovery_steps": 3},
    ),
    "adamw, reset": (adamw, {"refactorize_every": None, "reset_every": 5, "recovery_steps": 2}),
}


@pytest.mark.parametrize("order", rarely(["before", "after"], "before"))
@pytest.mark.parametrize("compile", rarely([False, True], False))
@pytest.mark.parametrize("case", rarely(CASES, "adamw, refactorized and reset"))
def test_run_follows_the_oracle(case: str, order: str, compile: bool) -> None:
    make, kwargs = CASES[case]
    iterates, lookaheads = oracle(make, **kwargs)
    model = LowRankToy()
    optimizer = make(model.parameters())

    def others() -> None:
        if kwargs["refactorize_every"]:
            every = kwargs["refactorize_every"]
            attach_weight_refactorization(optimizer, model, every_n_steps=every)
        if kwargs["reset_every"]:
            attach_momentum_reset(
                optimizer,
                every_n_steps=kwargs["reset_every"],
                recovery_steps=kwargs["recovery_steps"],
            )

    if order == "before":
        others()
    attach(optimizer, model, compile=compile, ends_late=compile)
    if order == "after":
        others()
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, t)
        # 12 steps of rounding at 1e-16, through a decomposition of condition below 1e3.
        assert largest_difference(weights(model), lookaheads[t]) < 1e-11, t
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        assert largest_difference(weights(model), iterates[t + 1]) < 1e-11, t
    untreated, _ = oracle(make, refactorize_every=None, reset_every=None)
    assert largest_difference(untreated[-1], iterates[-1]) > 1e-4


def test_without_transport_the_run_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    make, kwargs = CASES["sgd, refactorized"]
    iterates, _ = oracle(make, **kwargs)
    monkeypatch.setattr(refactorization, "transform", lambda *args: None)
    model = LowRankToy()
    optimizer = make(model.parameters())
    attach(optimizer, model)
    attach_weight_refactorization(optimizer, model, every_n_steps=4)
    train(model, optimizer, STEPS)
    assert largest_difference(weights(model), iterates[-1]) > 1e-4


@pytest.mark.parametrize(
    ("direction_dtype", "tolerance"),
    # Of the move along the direction: float64 weights have a float64 direction, the others round
    # each of its entries by 2^-9 and by 1/254 of the largest in its block.
    [("float32", 1e-10), ("bfloat16", 0.02), ("int8", 0.05)],
)
def test_lookahead_weight_and_average_stay(direction_dtype: str, tolerance: float) -> None:
    model = LowRankToy()
    if direction_dtype == "int8":  # which is for tensors of 4,096 elements and more
        model.first = LowRankLinear(5, 2048, rank=4, alpha=8.0).double()
        model.second = LowRankLinear(2048, 6, rank=4, alpha=8.0).double()
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model, direction_dtype=direction_dtype)
    train(model, optimizer, 5)
    assert (SCALES_KEY in optimizer.state[model.second.A]) == (direction_dtype == "int8")

    def points() -> dict[str, list[Tensor]]:
        found = {"iterate": weights(model)}
        with handle.at_average():
            found["average"] = weights(model)
        handle.extrapolate()
        found["lookahead"] = weights(model)
        handle._lookahead.retract()
        return found

    before, old = points(), snapshot(model)
    assert refactorize_(model, [optimizer]) == 2
    after = points()
    assert largest_difference(snapshot(model), old) > 1e-2
    assert largest_difference(after["iterate"], before["iterate"]) < 1e-13
    for name in ("lookahead", "average"):
        moved = largest_difference(before[name], before["iterate"])
        assert moved > 1e-6
        assert largest_difference(after[name], before[name]) < tolerance * moved


@pytest.mark.parametrize("rule", ["gpa", "snoo"])
def test_what_peers_keep_follows_too(rule: str) -> None:
    model = LowRankToy()
    optimizer = sgd(model.parameters())
    made = GPADirections(optimizer, 0.9) if rule == "gpa" else SlowWeights(optimizer, 4, 0.7, 0.9)
    Lookahead(made, LookaheadSchedule(0.0), module=model).attach()
    train(model, optimizer, 6)

    def kept() -> list[Tensor]:
        found = []
        for layer in model.layers:
            left, right = (optimizer.state[p][made.keys[0]] for p in (layer.B, layer.A))
            if rule == "gpa":  # a direction from the iterate to another point
                left, right = left + layer.B.detach(), right + layer.A.detach()
            found.append(left @ right)
        return found

    before = kept()
    assert refactorize_(model, [optimizer]) == 2
    assert largest_difference(kept(), before) < 1e-12
    assert (
        largest_difference([optimizer.state[model.first.B][made.keys[0]]], [model.first.B.detach()])
        > 1e-3
    )


@pytest.mark.parametrize("dtype", rarely([torch.float32, torch.float64], torch.float32))
@pytest.mark.parametrize("num_before", rarely(range(1, 8), 3))
def test_resume_is_bitwise_at_every_step(num_before: int, dtype: torch.dtype) -> None:
    def started(seed: int = 0) -> tuple[LowRankToy, Optimizer]:
        model = LowRankToy(dtype=dtype, seed=seed)
        optimizer = adamw(model.parameters())
        attach_weight_refactorization(optimizer, model, every_n_steps=3)
        attach(optimizer, model)
        attach_momentum_reset(optimizer, every_n_steps=3, recovery_steps=2)
        return model, optimizer

    whole, optimizer = started()
    train(whole, optimizer, 8)
    first, before = started()
    train(first, before, num_before)
    second, after = started(seed=1)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(through_a_file(before.state_dict()))
    train(second, after, 8 - num_before, start=num_before)
    assert equal(snapshot(second), snapshot(whole))
    fresh, new = started(seed=1)
    fresh.load_state_dict(first.state_dict())
    train(fresh, new, 8 - num_before, start=num_before)
    assert not equal(snapshot(fresh), snapshot(whole))  # the state matters


def test_sparse_entries_stay() -> None:
    model = LowRankToy(sparsity=0.2)
    optimizer = sgd(model.parameters())
    train(model, optimizer, 3)
    before, values = weights(model), model.first.sparse_values
    assert values is not None
    old = values.detach().clone()
    assert refactorize_(model) == 2
    assert largest_difference(weights(model), before) < 1e-13
    assert torch.equal(values.detach(), old)


def test_factor_of_zeros_is_left_alone_and_trains_on() -> None:
    model = LowRankToy()
    nn.init.zeros_(model.first.B)
    before = snapshot(model)
    assert refactorize_(model) == 1
    assert equal(before[:2], snapshot(model)[:2])
    optimizer = sgd(model.parameters())
    train(model, optimizer, 3)
    # The rank grows with the gradients of several steps.
    assert refactorize_(model) == 2
    train(model, optimizer, 1)
    assert model.first.B.grad is not None
    assert bool((model.first.B.grad.norm(dim=0) > 0).all())


def test_in_the_middle_of_a_step_it_is_refused() -> None:
    model = LowRankToy()
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model)
    train(model, optimizer, 2)
    loss_of(model, 2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"must hold the iterate.*after the optimizer's step"):
        refactorize_(model, [optimizer])
    assert equal(before, snapshot(model))
    optimizer.step()
    with handle.at_average(), pytest.raises(RuntimeError, match="outside of at_average"):
        refactorize_(model, [optimizer])
    refactorize_(model, [optimizer])


def test_bad_input_is_an_error_before_the_first_step() -> None:
    model = LowRankToy()
    optimizer = sgd(model.parameters())
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match="every_n_steps must be a whole number of at least 1"):
            attach_weight_refactorization(optimizer, model, every_n_steps=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has none. Call to_low_rank_\(model, rank"):
        attach_weight_refactorization(optimizer, nn.Linear(2, 2))
    halves = sgd([model.first.B, model.second.B, model.second.A])
    with pytest.raises(ValueError, match=r"must have one optimizer, and SGD has one .* 'first'"):
        attach_weight_refactorization(halves, model)
    model.first.B = nn.Parameter(model.first.B.detach().flatten())
    with pytest.raises(ValueError, match=r"factors of 'first' must be whole.*--strategy ddp"):
        refactorize_(model)


def test_detached_handle_does_nothing_more() -> None:
    model = LowRankToy()
    optimizer = sgd(model.parameters())
    attach_weight_refactorization(optimizer, model, every_n_steps=1).detach()
    twin = LowRankToy()
    plain = sgd(twin.parameters())
    train(model, optimizer, 3)
    train(twin, plain, 3)
    assert equal(snapshot(model), snapshot(twin))


def test_converted_language_model_looks_ahead_and_is_refactorized() -> None:
    from tests.optimizers.tiny import TinyLM
    from tests.optimizers.tiny import train as train_tiny

    model = TinyLM()
    to_low_rank_(model, rank=3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    attach(optimizer, model)
    attach_weight_refactorization(optimizer, model, every_n_steps=2)
    after = train_tiny(model, optimizer, 6)
    assert all(p.isfinite().all() for p in after)
    assert DIRECTION_KEY in optimizer.state[model.up.B]  # type: ignore[index]
