"""What the parameters hold, and when, around one base optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.progress import STEP_KEY
from tests.core.problem import Attach, direction, loss_of, start, train
from tests.toys import HalfStep, adamw, equal, relative_error


def test_moves_are_idempotent(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    y = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    assert equal(params, y)
    assert not equal(y, x)
    for p, x_i, y_i in zip(params, x, y, strict=True):
        torch.testing.assert_close(y_i, x_i + 0.5 * direction(lookahead, p))
    lookahead.pause()
    lookahead.pause()
    assert relative_error(params, x) < 1e-7  # one unit in the last place of few elements
    lookahead.extrapolate()
    assert equal(params, y)  # bit for bit what was left
    lookahead.retract()
    lookahead.retract()
    assert relative_error(params, x) < 1e-7
    assert not lookahead.is_open


def test_frozen_parameters_do_not_move(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    params[0].requires_grad_(False)
    frozen = params[0].detach().clone()
    m = direction(lookahead, params[0]).clone()
    train(lookahead, params, 3)
    assert torch.equal(params[0], frozen)
    assert torch.equal(direction(lookahead, params[0]), m)
    params[0].requires_grad_(True)
    train(lookahead, params, 1)
    assert not torch.equal(params[0], frozen)


def test_exception_in_the_closure_leaves_y_to_be_retracted(attach: Attach) -> None:
    params = start()
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]

    def closure() -> Tensor:
        lookahead.extrapolate()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)  # type: ignore[arg-type]  # it returns a tensor
    assert not equal(params, x)
    lookahead.retract()
    assert relative_error(params, x) < 1e-7
    train(lookahead, params, 1)  # and training can go on
    assert lookahead.step_idx == 4


@pytest.mark.parametrize("how", ["retract", "extrapolate", "at_iterate"])
def test_exception_inside_the_step_keeps_what_was_stepped_and_returns_the_rest(
    attach: Attach, how: str
) -> None:
    params = start(torch.float64)
    optimizer = HalfStep(params, lr=0.05)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    m = [direction(lookahead, p).clone() for p in params]
    optimizer.fails = True
    with pytest.raises(MemoryError):
        train(lookahead, params, 1)
    stepped = params[0].detach().clone()
    folded = direction(lookahead, params[1]).clone()

    def check() -> None:
        torch.testing.assert_close(params[0].detach(), stepped, rtol=0, atol=0)
        torch.testing.assert_close(params[1].detach(), x[1])
        expected = 0.9 * m[0] + 0.1 * (stepped - x[0])
        torch.testing.assert_close(direction(lookahead, params[0]), expected)
        torch.testing.assert_close(direction(lookahead, params[1]), m[1])

    if how == "at_iterate":  # a signal handler that saves a checkpoint in the middle of a step
        with lookahead.at_iterate():
            check()
        assert lookahead.is_open
        assert torch.equal(direction(lookahead, params[1]), folded)
    elif how == "retract":
        lookahead.retract()
        check()
    optimizer.fails = False
    train(lookahead, params, 1)
    assert lookahead.step_idx == 4
    assert torch.isfinite(params[0]).all()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("with_forward", [False, True])
def test_training_continues_after_a_step_that_raised(
    attach: Attach, form: str, looks: bool, with_forward: bool
) -> None:
    """The user catches the exception, maybe evaluates, and trains on."""

    def train_on(*, looks: bool) -> tuple[list[nn.Parameter], Lookahead]:
        params = start(torch.float64)
        optimizer = HalfStep(params, lr=0.05)
        lookahead = attach(optimizer)
        train(lookahead, params, 3)
        optimizer.fails = True
        with pytest.raises(MemoryError):
            train(lookahead, params, 1)
        optimizer.fails = False
        if looks:
            lookahead.pause()  # as an evaluation does
        if with_forward:
            train(lookahead, params, 1)
        else:
            optimizer.step()  # once more, from where the parameters are
        train(lookahead, params, 4)
        return params, lookahead

    params, lookahead = train_on(looks=looks)
    expected, _ = train_on(looks=False)
    assert lookahead.step_idx == 8
    if form == "one pass":  # an update that ends early rounds otherwise than one that is joined
        assert relative_error(params, expected) < 1e-14
    else:
        assert equal(params, expected)


def test_at_iterate_inside_a_forward_pass_leaves_the_graph_intact(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    loss = loss_of(params)
    with lookahead.at_iterate():
        assert relative_error(params, x) < 1e-7
    lookahead.base_optimizer.zero_grad()
    torch.autograd.backward(loss)  # saved tensors are whole and unmarked
    expected = torch.autograd.grad(loss_of(params), params)
    assert equal([p.grad for p in params if p.grad is not None], expected)


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_the_scaler_changes_nothing(attach: Attach, fused: bool, form: str) -> None:
    params = start()
    optimizer = torch.optim.AdamW(params, lr=1e-2, fused=fused)
    lookahead = attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        lookahead.extrapolate()
        torch.autograd.backward(scaler.scale(loss_of(params) * factor))
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        step(1.0)
    x = [p.detach().clone() for p in params]
    m = [direction(lookahead, p).clone() for p in params]
    step(float("inf"))
    lookahead.skip()
    assert not lookahead.is_open
    assert relative_error(params, x) < 1e-7
    kept = [direction(lookahead, p).clone() for p in params]
    if form == "separate passes":
        assert equal(kept, m)
    else:
        # Going back from the fold leaves a rounding of (1 - 0.9) y, where |y| < 3 and |m| ~ 0.003.
        torch.testing.assert_close(kept, m, rtol=0, atol=0.1 * 3 * 1.2e-7)
        for _ in range(5):  # once: a parameter that was not stepped is left out of the joined pass
            step(float("inf"))
            lookahead.skip()
            lookahead.progress.step_idx -= 1
        assert equal([direction(lookahead, p) for p in params], kept)
    assert lookahead.step_idx == 4
    lookahead.skip()
    assert lookahead.step_idx == 4
    step(1.0)
    assert relative_error(params, x) > 1e-4
    assert not equal([direction(lookahead, p) for p in params], m)


def test_detach_returns_to_the_iterate_and_removes_the_hooks(attach: Attach) -> None:
    params = start()
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    lookahead.detach()
    assert relative_error(params, x) < 1e-7
    optimizer.step()
    assert optimizer.param_groups[0][STEP_KEY] == 3
    hooks = [
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        optimizer._optimizer_load_state_dict_pre_hooks,
        optimizer._optimizer_load_state_dict_post_hooks,
        optimizer._optimizer_state_dict_pre_hooks,
        optimizer._optimizer_state_dict_post_hooks,
    ]
    assert not any(hooks)
