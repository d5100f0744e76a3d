"""The direction in the base optimizer's state: when it is there, and that a run continues."""

from __future__ import annotations

import copy
import gc
import io
from types import FrameType, ModuleType

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.core.progress import MAX_LR_KEY
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core.problem import Attach, direction, loss_of, start, train
from tests.toys import MakeOptimizer, adamw, equal, sgd


def test_state_is_one_float32_tensor_for_each_parameter(attach: Attach) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        params = start(dtype)
        plain = adamw(start(dtype))
        lookahead = attach(adamw(params))
        train(lookahead, params, 3)
        train(attach(plain), plain.param_groups[0]["params"], 1)
        for p in params:
            assert direction(lookahead, p).dtype == expected
            assert direction(lookahead, p).shape == p.shape
            extra = set(lookahead.base_optimizer.state[p]) - {"step", "exp_avg", "exp_avg_sq"}
            assert extra == {DIRECTION_KEY}


def test_between_steps_no_other_tensor_is_held(attach: Attach) -> None:
    """Counted by the garbage collector: whoever holds a copy of a parameter is found."""
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    lookahead.rule.make_state_readable()
    own = {id(t) for t in lookahead.rule.store.tensors(params)}
    allowed = own | {id(p) for p in params} | {id(p.grad) for p in params}
    base = {"exp_avg", "exp_avg_sq"}
    allowed |= {id(lookahead.base_optimizer.state[p][key]) for p in params for key in base}
    assert len(own) == len(params)
    held: list[object] = [lookahead]
    seen: set[int] = set()
    while held:
        value = held.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType, FrameType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            assert value.numel() < 6 or id(value) in allowed
            continue
        # Globals of functions lead everywhere, also to other tests.
        held += [r for r in gc.get_referents(value) if r is not getattr(value, "__globals__", None)]
    assert own <= seen


def test_direction_appears_after_the_base_optimizer_has_initialised_its_state(
    attach: Attach,
) -> None:
    params = start()
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    lookahead.extrapolate()
    assert not optimizer.state
    train(lookahead, params, 1)
    assert {"exp_avg", DIRECTION_KEY} <= set(optimizer.state[params[0]])


def test_unused_parameter_of_a_stateless_optimizer_gets_a_zero_direction(attach: Attach) -> None:
    params, unused = start(), nn.Parameter(torch.ones(3))
    lookahead = attach(sgd([*params, unused]))
    lookahead.extrapolate()
    assert not lookahead.base_optimizer.state
    train(lookahead, params, 2)
    assert torch.equal(direction(lookahead, unused), torch.zeros(3))
    assert torch.equal(unused, torch.ones(3))


def test_parameters_added_later_get_a_direction(attach: Attach) -> None:
    params = start()
    optimizer = adamw(params[:1])
    lookahead = attach(optimizer)
    train(lookahead, params[:1], 3)
    optimizer.add_param_group({"params": params[1:]})
    train(lookahead, params, 3)
    assert DIRECTION_KEY in optimizer.state[params[1]]
    assert optimizer.state_dict()["param_groups"][1][MAX_LR_KEY] == 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_state_continues_bitwise(attach: Attach, dtype: torch.dtype) -> None:
    params = start(dtype)
    lookahead = attach(adamw(params), warmup=2, rest=2, total_steps=20)
    train(lookahead, params, 9)
    file = io.BytesIO()
    torch.save([params, lookahead.base_optimizer.state_dict()], file)
    file.seek(0)
    loaded, state = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach()) for p in loaded]
    again = attach(adamw(resumed), warmup=2, rest=2, total_steps=20)
    again.base_optimizer.load_state_dict(state)
    assert again.step_idx == 9
    for num_steps in (9, 2):  # up to the rest, and in it
        train(lookahead, params, num_steps)
        train(again, resumed, num_steps)
        assert equal(params, resumed)
        for p, q in zip(params, resumed, strict=True):
            assert torch.equal(direction(lookahead, p), direction(again, q))
            assert direction(again, q).dtype == torch.float32


def test_directions_of_another_dtype_are_converted(attach: Attach) -> None:
    params = start(torch.bfloat16)
    lookahead = attach(adamw(params))
    train(lookahead, params, 2)
    state = lookahead.base_optimizer.state_dict()
    for entry in state["state"].values():
        entry[DIRECTION_KEY] = entry[DIRECTION_KEY].double()
    lookahead.base_optimizer.load_state_dict(state)
    assert direction(lookahead, params[0]).dtype == torch.float32


def test_state_made_without_the_method_starts_with_a_zero_direction(attach: Attach) -> None:
    params = start()
    plain = adamw(params)
    torch.autograd.backward(loss_of(params))
    plain.step()
    fresh = attach(adamw(params))
    fresh.base_optimizer.load_state_dict(plain.state_dict())
    assert fresh.progress.is_new
    x = [p.detach().clone() for p in params]
    fresh.extrapolate()
    assert equal(params, x)
    train(fresh, params, 1)
    m = direction(fresh, params[0])
    torch.testing.assert_close(m, 0.1 * (params[0].detach() - x[0]))


def test_state_made_with_the_method_loads_without_it(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    plain = adamw(params)
    plain.load_state_dict(lookahead.base_optimizer.state_dict())
    plain.step()
    assert plain.state[params[0]]["step"] == 4


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_a_run_that_is_made_longer_in_its_last_part_continues_exactly(
    attach: Attach, make_optimizer: MakeOptimizer
) -> None:
    params = start()
    optimizer = make_optimizer(params)
    lookahead = attach(optimizer, rest=3, total_steps=8)
    train(lookahead, params, 7)
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    longer = attach(make_optimizer(twin), rest=3, total_steps=20)
    longer.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    lookahead.schedule = LookaheadSchedule(0.5, rest=3, total_steps=20)
    train(lookahead, params, 5)
    train(longer, twin, 5)
    assert equal(params, twin)
    assert equal(
        *([direction(m, p) for p in ps] for m, ps in ((lookahead, params), (longer, twin)))
    )
    rested = [nn.Parameter(p.detach().clone()) for p in params]
    assert longer.step_idx == 12
    train(longer, twin, 1)
    plain = attach(make_optimizer(rested), warmup=100)
    plain.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, rested, 1)
    assert not equal(rested, twin)  # it looks ahead again


def test_a_real_step_with_learning_rates_of_zero_is_a_step(attach: Attach) -> None:
    params = start(torch.float64)
    optimizer = sgd(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    m = [direction(lookahead, p).clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.zero_grad()
    torch.autograd.backward(loss_of(params))
    optimizer.step()  # no extrapolation before it
    assert lookahead.step_idx == 4
    for p, m_p in zip(params, m, strict=True):
        torch.testing.assert_close(direction(lookahead, p), 0.9 * m_p)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_the_step_that_only_makes_state_is_none(
    attach: Attach, make_optimizer: MakeOptimizer
) -> None:
    """torch.distributed.checkpoint calls it before it loads or saves."""
    params = start()
    optimizer = make_optimizer(params)
    lookahead = attach(optimizer)
    x = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert lookahead.progress.is_new
    assert equal(params, x)
    assert equal([direction(lookahead, p) for p in params], [torch.zeros_like(p) for p in params])


def test_a_second_method_on_one_optimizer_is_refused(attach: Attach) -> None:
    optimizer = adamw(start())
    first = attach(optimizer)
    with pytest.raises(RuntimeError, match="AdamW must have one lookahead method"):
        attach(optimizer)
    first.detach()
    attach(optimizer)
