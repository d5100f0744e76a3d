"""Placement, state and identity around one base optimizer, in plain PyTorch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema_nesterov.core.lookahead import STEP_KEY, Lookahead, Stage
from lightning_ema_nesterov.core.schedule import MAX_LR_KEY, LookaheadSchedule
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, EMADirections
from lightning_ema_nesterov.rules.ema_joined import OnePassDirections
from tests.core import reference
from tests.toys import MakeOptimizer, adamw, equal, momentum, muon, relative_error, sgd

CURVATURE = torch.diag(torch.linspace(0.1, 2.0, 6, dtype=torch.float64))


FORMS: dict[str, Callable[..., EMADirections]] = {
    "separate passes": EMADirections,
    "joined passes": OnePassDirections,
    "one pass": partial(OnePassDirections, ends_late=True),
}
make_directions: Callable[..., EMADirections] = EMADirections


@pytest.fixture(autouse=True, params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with every form of the same arithmetic."""
    monkeypatch.setitem(globals(), "make_directions", FORMS[request.param])
    return str(request.param)


def start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6, 2)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(value.to(dtype)) for value in values]


def loss_of(params: Iterable[Tensor]) -> Tensor:
    terms = [0.5 * (p * (CURVATURE.to(p.dtype) @ p)).sum() + p.sin().sum() for p in params]
    return torch.stack(terms).sum()


def gradients(params: list[Tensor], step_idx: int) -> list[Tensor]:
    return [CURVATURE.to(p.dtype) @ p + p.cos() for p in params]


def attach(optimizer: Optimizer, **kwargs: Any) -> Lookahead:
    options = {"lookahead_step_size": 0.5, "ema_decay": 0.9, **kwargs}
    ema_decay = options.pop("ema_decay")
    directions = make_directions(optimizer, ema_decay)
    return Lookahead(optimizer, LookaheadSchedule(**options), directions).attach()


def train(lookahead: Lookahead, params: list[nn.Parameter], num_steps: int) -> None:
    for _ in range(num_steps):
        lookahead.base_optimizer.zero_grad()
        lookahead.extrapolate()
        loss_of(params).backward()
        lookahead.base_optimizer.step()


def direction(lookahead: Lookahead, p: Tensor) -> Tensor:
    lookahead.method.make_whole()
    tensor: Tensor = lookahead.base_optimizer.state[p][DIRECTION_KEY]
    return tensor


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw, muon])
def test_two_hundred_steps_match_the_reference(make_optimizer: MakeOptimizer) -> None:
    # Muon orthogonalises in bfloat16, so its oracle runs in float32.
    dtype = torch.float32 if make_optimizer is muon else torch.float64
    params = start(dtype)
    (trajectory, _), (_, expected_m) = (
        reference.train(
            params,
            gradients,
            make_optimizer,
            num_steps=num_steps,
            ema_decay=0.9,
            step_size=lambda t: 0.5 if 20 <= t < 170 else 0.0,
            dtype=dtype,
        )
        for num_steps in (200, 170)
    )
    optimizer = make_optimizer(params)
    lookahead = attach(optimizer, warmup=20, rest=30, total_steps=200)
    for step_idx in range(200):
        if step_idx == 170:
            m = [direction(lookahead, p).clone() for p in params]
        lookahead.extrapolate()
        for p, gradient in zip(
            params, gradients([p.detach() for p in params], step_idx), strict=True
        ):
            p.grad = gradient
        optimizer.step()
    # float64 rounding over 200 steps; Muon works in bfloat16, where one unit is 0.4 %.
    tolerance = 1e-4 if make_optimizer is muon else 1e-12
    assert relative_error(params, trajectory[-1]) < tolerance
    assert relative_error(m, expected_m) < 100 * tolerance
    assert not any(lookahead.method.has(p) for p in params)  # freed in the rest
    untreated, _ = reference.train(
        start(dtype),
        gradients,
        make_optimizer,
        num_steps=200,
        ema_decay=0.9,
        step_size=lambda _: 0.0,
        dtype=dtype,
    )
    assert relative_error(untreated[100], trajectory[100]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 20}])
def test_zero_step_size_matches_base_optimizer_bitwise(
    dtype: torch.dtype, kwargs: dict[str, Any]
) -> None:
    params, plain = start(dtype), start(dtype)
    train(attach(adamw(params), **kwargs), params, 20)
    optimizer = adamw(plain)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(plain).backward()
        optimizer.step()
    assert equal(params, plain)
    treated = start(dtype)
    train(attach(adamw(treated)), treated, 20)
    assert not equal(treated, plain)


def test_state_is_one_float32_tensor_for_each_parameter() -> None:
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
    assert set(vars(lookahead)) == set(vars(attach(adamw(start()))))
    kept = [
        value for value in vars(lookahead).values() if isinstance(value, (dict, list)) and value
    ]
    assert kept == [lookahead._handles]  # between steps nothing else holds tensors


def test_direction_appears_after_the_base_optimizer_has_initialised_its_state() -> None:
    params = start()
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    lookahead.extrapolate()
    assert not optimizer.state
    train(lookahead, params, 1)
    assert {"exp_avg", DIRECTION_KEY} <= set(optimizer.state[params[0]])


def test_moves_are_idempotent() -> None:
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
    assert lookahead.stage is Stage.ITERATE


def test_step_size_is_frozen_from_extrapolation_to_fold() -> None:
    params = start(torch.float64)
    optimizer = sgd(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 2)
    x = [p.detach().clone() for p in params]
    m = [direction(lookahead, p).clone() for p in params]
    lookahead.extrapolate()
    optimizer.param_groups[0]["lr"] *= 0.1  # as LitGPT does between micro-batches
    lookahead.extrapolate()
    optimizer.step()
    for p, x_i, m_i in zip(params, x, m, strict=True):
        expected = 0.9 * m_i + 0.1 * (p.detach() - x_i)
        torch.testing.assert_close(direction(lookahead, p), expected)


def test_each_group_follows_its_own_learning_rate() -> None:
    params = start(torch.float64)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.02, "max_lr": 0.04}]
    optimizer = torch.optim.SGD(groups)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    for p, x_i, step_size in zip(params, x, (0.5, 0.25), strict=True):
        torch.testing.assert_close(p.detach(), x_i + step_size * direction(lookahead, p))


def test_frozen_parameters_do_not_move() -> None:
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


def test_parameters_without_gradient_take_no_step() -> None:
    params = start(torch.float64)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = adamw([*params, unused])

    def sometimes(ps: list[Tensor], step_idx: int) -> list[Tensor | None]:
        full = gradients(ps[:2], step_idx)
        return [full[0], full[1] if step_idx % 3 else None, None]

    lookahead = attach(optimizer)
    trajectory, expected_m = reference.train(
        [*params, unused],
        sometimes,
        adamw,
        num_steps=30,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    for step_idx in range(30):
        lookahead.extrapolate()
        held = [*params, unused]
        for p, g in zip(held, sometimes([p.detach() for p in held], step_idx), strict=True):
            p.grad = g
        optimizer.step()
    assert relative_error([*params, unused], trajectory[-1]) < 1e-12
    assert relative_error([direction(lookahead, p) for p in params], expected_m[:2]) < 1e-10
    assert unused not in optimizer.state
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))


def test_unused_parameter_of_a_stateless_optimizer_gets_a_zero_direction() -> None:
    params, unused = start(), nn.Parameter(torch.ones(3))
    lookahead = attach(sgd([*params, unused]))
    lookahead.extrapolate()
    assert not lookahead.base_optimizer.state
    train(lookahead, params, 2)
    assert torch.equal(direction(lookahead, unused), torch.zeros(3))
    assert torch.equal(unused, torch.ones(3))


def test_parameters_added_later_get_a_direction() -> None:
    params = start()
    optimizer = adamw(params[:1])
    lookahead = attach(optimizer)
    train(lookahead, params[:1], 3)
    optimizer.add_param_group({"params": params[1:]})
    train(lookahead, params, 3)
    assert DIRECTION_KEY in optimizer.state[params[1]]
    assert optimizer.param_groups[1][MAX_LR_KEY] == 1e-2


class PlainSubclass(torch.optim.SGD):
    """Calls ``super().step()``, so the hooks fire twice, and then changes parameters once more."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_that_fire_twice_count_once(with_closure: bool) -> None:
    params = start(torch.float64)

    def make(ps: Iterable[Tensor]) -> Optimizer:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # patches the parent's step
        return PlainSubclass(ps, lr=0.05)

    trajectory, expected_m = reference.train(
        params, gradients, make, num_steps=10, ema_decay=0.9, step_size=lambda _: 0.5
    )
    optimizer = make(params)
    lookahead = attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        lookahead.extrapolate()
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(10):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert relative_error(params, trajectory[-1]) < 1e-12
    assert relative_error([direction(lookahead, p) for p in params], expected_m) < 1e-11
    assert lookahead.step_idx == 10


@pytest.mark.parametrize("keyword", [False, True])
def test_lbfgs_calls_its_closure_many_times(keyword: bool) -> None:
    params = start(torch.float64)
    optimizer = torch.optim.LBFGS(params, lr=0.1, max_iter=4)
    lookahead = attach(optimizer)
    points: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        lookahead.extrapolate()
        points.append(params[0].detach().clone())
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(5):
        x = [p.detach().clone() for p in params]
        m = [torch.zeros_like(p) if p not in optimizer.state else direction(lookahead, p).clone()
             for p in params]  # fmt: skip
        points.clear()
        if keyword:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
        assert len(points) > 1
        # The first evaluation is at y; the later ones where LBFGS went, without a second lookahead.
        torch.testing.assert_close(points[0], x[0] + 0.5 * m[0])
        for p, x_i, m_i in zip(params, x, m, strict=True):
            expected = 0.9 * m_i + 0.1 * (p.detach() - x_i)
            torch.testing.assert_close(direction(lookahead, p), expected)


def test_optimizer_that_ignores_its_closure_is_refused() -> None:
    class Deaf(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return None

    params = start()
    optimizer = Deaf(params, lr=0.1)
    attach(optimizer)
    with pytest.raises(RuntimeError, match=r"Deaf.step\(\) must call the closure"):
        optimizer.step(lambda: None)


def test_optimizer_that_moves_before_its_closure_is_refused() -> None:
    class Sharpness(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            assert closure is not None
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
            return closure()

    params = start()
    optimizer = Sharpness(params, lr=0.1)
    attach(optimizer)
    with pytest.raises(RuntimeError, match=r"does not support optimizers .* like SAM"):
        optimizer.step(lambda: None)


def test_exception_in_the_closure_leaves_y_to_be_retracted() -> None:
    params = start()
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]

    def closure() -> Tensor:
        lookahead.extrapolate()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not equal(params, x)
    lookahead.retract()
    assert relative_error(params, x) < 1e-7
    train(lookahead, params, 1)  # and training can go on
    assert lookahead.step_idx == 4


class HalfStep(torch.optim.SGD):
    """Steps the first parameter, then fails when told to."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for idx, p in enumerate(self.param_groups[0]["params"]):
            if self.fails and idx == 1:
                raise MemoryError
            p.add_(p.grad, alpha=-0.05)


@pytest.mark.parametrize("how", ["retract", "extrapolate", "at_iterate"])
def test_exception_inside_the_step_keeps_what_was_stepped_and_returns_the_rest(how: str) -> None:
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
        assert lookahead.stage is Stage.STEPPING
        assert torch.equal(direction(lookahead, params[1]), folded)
    elif how == "retract":
        lookahead.retract()
        check()
    optimizer.fails = False
    train(lookahead, params, 1)
    assert lookahead.step_idx == 4
    assert torch.isfinite(params[0]).all()


def test_at_iterate_inside_a_forward_pass_leaves_the_graph_intact() -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    loss = loss_of(params)
    with lookahead.at_iterate():
        assert relative_error(params, x) < 1e-7
    lookahead.base_optimizer.zero_grad()
    loss.backward()  # saved tensors are whole and unmarked
    expected = torch.autograd.grad(loss_of(params), params)
    assert equal([p.grad for p in params if p.grad is not None], expected)


@pytest.mark.parametrize("fused", [False, True])
def test_step_skipped_by_the_scaler_changes_nothing(fused: bool, form: str) -> None:
    params = start()
    optimizer = torch.optim.AdamW(params, lr=1e-2, fused=fused)
    lookahead = attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        lookahead.extrapolate()
        scaler.scale(loss_of(params) * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        step(1.0)
    x = [p.detach().clone() for p in params]
    m = [direction(lookahead, p).clone() for p in params]
    step(float("inf"))
    lookahead.skip()
    assert lookahead.stage is Stage.ITERATE
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
            lookahead.step_idx -= 1
        assert equal([direction(lookahead, p) for p in params], kept)
    assert lookahead.step_idx == 4
    lookahead.skip()
    assert lookahead.step_idx == 4
    step(1.0)
    assert relative_error(params, x) > 1e-4
    assert not equal([direction(lookahead, p) for p in params], m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_state_continues_bitwise(dtype: torch.dtype) -> None:
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
            assert lookahead.method.has(p) == again.method.has(q) == (num_steps == 9)
            if num_steps == 9:
                assert torch.equal(direction(lookahead, p), direction(again, q))
                assert direction(again, q).dtype == torch.float32


def test_directions_of_another_dtype_are_converted() -> None:
    params = start(torch.bfloat16)
    lookahead = attach(adamw(params))
    train(lookahead, params, 2)
    state = lookahead.base_optimizer.state_dict()
    for entry in state["state"].values():
        entry[DIRECTION_KEY] = entry[DIRECTION_KEY].double()
    lookahead.base_optimizer.load_state_dict(state)
    assert direction(lookahead, params[0]).dtype == torch.float32


def test_state_made_without_the_method_starts_with_a_zero_direction() -> None:
    params = start()
    plain = adamw(params)
    loss_of(params).backward()
    plain.step()
    fresh = attach(adamw(params))
    fresh.base_optimizer.load_state_dict(plain.state_dict())
    assert fresh.is_new
    x = [p.detach().clone() for p in params]
    fresh.extrapolate()
    assert equal(params, x)
    train(fresh, params, 1)
    m = direction(fresh, params[0])
    torch.testing.assert_close(m, 0.1 * (params[0].detach() - x[0]))


def test_state_made_with_the_method_loads_without_it() -> None:
    params = start()
    lookahead = attach(adamw(params))
    train(lookahead, params, 3)
    plain = adamw(params)
    plain.load_state_dict(lookahead.base_optimizer.state_dict())
    plain.step()
    assert plain.state[params[0]]["step"] == 4


def test_detach_returns_to_the_iterate_and_removes_the_hooks() -> None:
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
    ]
    assert not any(hooks)


@pytest.mark.parametrize("ema_decay", [0.9, 0.99])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_bfloat16_parameters_are_followed_better_than_with_two_bfloat16_buffers(
    make_optimizer: MakeOptimizer, ema_decay: float
) -> None:
    """Updates near one unit in the last place of the parameters, against the float64 recursion."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(5000, generator=generator, dtype=torch.float64)

    x_0 = (0.2 * random()).bfloat16()
    drift = random()
    noisy = [0.02 * (drift + random()) for _ in range(300)]

    def make(params: Iterable[Tensor]) -> Optimizer:
        optimizer = make_optimizer(params)
        optimizer.param_groups[0]["lr"] *= 0.1
        return optimizer

    results = [
        reference.train(
            [x_0],
            lambda _, step_idx: [noisy[step_idx]],
            make,
            num_steps=300,
            ema_decay=ema_decay,
            step_size=lambda _: 0.5,
            dtype=dtype,
        )
        for dtype in (torch.float64, torch.bfloat16)
    ]
    (exact, exact_m), (two_buffers, two_buffers_m) = results
    p = nn.Parameter(x_0.clone())
    lookahead = attach(make([p]), ema_decay=ema_decay)
    for gradient in noisy:
        lookahead.extrapolate()
        p.grad = gradient.bfloat16()
        lookahead.base_optimizer.step()
    ours = relative_error([direction(lookahead, p)], exact_m)
    theirs = relative_error(two_buffers_m, exact_m)
    assert ours < theirs
    moved = exact[-1][0] - x_0.double()
    errors = [(x.double() - exact[-1][0]).norm() for x in (p.detach(), two_buffers[-1][0])]
    assert errors[0] <= errors[1] < 2 * moved.norm()


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_direction_is_freed_when_the_rest_begins(make_optimizer: MakeOptimizer) -> None:
    params = start()
    optimizer = make_optimizer(params)
    lookahead = attach(optimizer, rest=3, total_steps=8)
    train(lookahead, params, 5)
    assert all(lookahead.method.has(p) for p in params)
    lookahead.will_measure = True
    train(lookahead, params, 1)
    own = {"step", "exp_avg", "exp_avg_sq"} if make_optimizer is adamw else set()
    assert all(set(optimizer.state.get(p, {})) <= own for p in params)
    assert lookahead.metrics is not None
    assert lookahead.metrics.as_scalars() == {"ema_nesterov/step_size": 0.0}
    state = copy.deepcopy(optimizer.state_dict())
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    again = attach(make_optimizer(twin), rest=3, total_steps=8)
    again.base_optimizer.load_state_dict(state)
    train(lookahead, params, 2)
    train(again, twin, 2)
    assert equal(params, twin)
    # A run that was made longer starts with m = 0.
    longer = [nn.Parameter(p.detach().clone()) for p in params]
    extended = attach(make_optimizer(longer), rest=3, total_steps=20)
    extended.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(extended, longer, 1)
    for p, x in zip(longer, params, strict=True):
        torch.testing.assert_close(direction(extended, p), 0.1 * (p.detach() - x.detach()))


def test_without_a_rest_nothing_is_freed() -> None:
    params = start()
    lookahead = attach(adamw(params), rest=0, total_steps=3)
    train(lookahead, params, 5)
    assert all(lookahead.method.has(p) for p in params)


def test_metrics_of_a_step_match_the_definition() -> None:
    params = start(torch.float64)
    lookahead = attach(sgd(params))
    train(lookahead, params, 2)
    x = torch.cat([p.detach().flatten() for p in params])
    m = torch.cat([direction(lookahead, p).flatten() for p in params])
    lookahead.will_measure = True
    train(lookahead, params, 1)
    metrics = lookahead.metrics
    moved = torch.cat([p.detach().flatten() for p in params]) - x
    m_next = torch.cat([direction(lookahead, p).flatten() for p in params])
    assert metrics is not None
    assert metrics.as_scalars() == pytest.approx(
        {
            "ema_nesterov/step_size": 0.5,
            "ema_nesterov/direction_norm": m_next.norm().item(),
            "ema_nesterov/displacement_norm": moved.norm().item(),
            "ema_nesterov/alignment": torch.cosine_similarity(m, moved, dim=0).item(),
        }
    )
    train(lookahead, params, 1)
    assert lookahead.metrics is metrics  # only the step that was asked for


def test_complex_parameters_and_steps_without_any_gradient_are_measured() -> None:
    p = nn.Parameter(torch.tensor([3.0 + 4.0j]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    lookahead = attach(optimizer)
    lookahead.will_measure = True
    p.grad = torch.tensor([6.0 + 8.0j])
    optimizer.step()
    metrics = lookahead.metrics
    assert metrics is not None
    assert metrics.displacement_norm == pytest.approx(5.0)
    lookahead.will_measure = True
    p.grad = None
    optimizer.step()
    metrics = lookahead.metrics
    assert metrics is not None
    assert metrics.displacement_norm == 0.0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"base_optimizer must be a torch.optim.Optimizer, got .*list"
    ):
        Lookahead([], LookaheadSchedule(0.5), EMADirections([], 0.9))
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        EMADirections(sgd(start()), ema_decay=1.0)
