"""Looks at an attached module in the middle of a step, copies of it, and weights loaded into it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov import EMANesterovHandle, attach_ema_nesterov
from lightning_ema_nesterov.core import module_hooks
from tests.toys import equal

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def attach(model: nn.Module, optimizer: Any = None, **kwargs: Any) -> EMANesterovHandle:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    options = {"ema_decay": 0.8, "warmup": 0, "rest": 0, **kwargs}
    return attach_ema_nesterov(optimizer, model, **options)


def optimizer_of(handle: EMANesterovHandle) -> torch.optim.Optimizer:
    return handle._lookahead.base_optimizer


def train(
    handle: EMANesterovHandle,
    model: nn.Module,
    num_steps: int,
    look: Callable[[], object] = lambda: None,
) -> None:
    for _ in range(num_steps):
        optimizer_of(handle).zero_grad()
        loss = model(INPUTS).square().mean()
        look()
        loss.backward()
        look()
        optimizer_of(handle).step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained(num_steps: int = 6, **kwargs: Any) -> tuple[nn.Module, EMANesterovHandle]:
    model = make_model()
    handle = attach(model, **kwargs)
    train(handle, model, num_steps)
    return model, handle


def no_grad_forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(INPUTS)
    return out


def eval_forward(model: nn.Module) -> Tensor:
    model.eval()
    out: Tensor = model(INPUTS).detach()
    model.train()
    return out


def failing_forward(model: nn.Module) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="mat1"):
        model(INPUTS[:, :3])


LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "without gradients": no_grad_forward,
    "in evaluation mode": eval_forward,
    "that raises": failing_forward,
    "at the state": lambda model: model.state_dict(),
    "at the state of a part": lambda model: next(model.children()).state_dict(),
}


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"compile": True}, {"direction_dtype": "bfloat16"}], ids=str
)
def test_a_look_between_forward_and_backward_changes_no_gradient(
    name: str, kwargs: dict[str, Any]
) -> None:
    model, twin = make_model(), make_model()
    look = LOOKS[name]
    train(attach(model, **kwargs), model, 20, lambda: look(model))
    train(attach(twin, **kwargs), twin, 20)
    assert equal(weights(model), weights(twin))
    plain = make_model()
    train(attach(plain, lookahead_step_size=0.0), plain, 20)
    assert not equal(weights(plain), weights(twin))


@pytest.mark.parametrize("look", [no_grad_forward, eval_forward])
def test_a_look_sees_the_iterate(look: Callable[[nn.Module], Tensor]) -> None:
    model, handle = trained()
    expected = look(model)
    assert torch.equal(expected, look(model))
    at_y = model(INPUTS)
    assert not torch.allclose(at_y, expected, rtol=1e-6)
    torch.testing.assert_close(look(model), expected)
    assert handle is not None


def test_the_state_in_a_window_is_a_copy_of_the_iterate() -> None:
    model, handle = trained()
    x = weights(model)
    assert model.state_dict()["0.weight"].data_ptr() == next(model.parameters()).data_ptr()
    model(INPUTS)
    assert not equal(weights(model), x)
    states = [model.state_dict(), {f"0.{k}": v for k, v in model[0].state_dict().items()}]  # type: ignore[index]  # of a Sequential
    for state in states:
        for key, value in state.items():
            torch.testing.assert_close(value, dict(zip(model.state_dict(), x, strict=True))[key])
    optimizer_of(handle).step()
    torch.testing.assert_close(states[0]["0.weight"], x[0])  # no view of what moves


def test_backward_through_an_evaluation_in_a_window_is_refused() -> None:
    model, handle = trained()
    model(INPUTS).sum().backward()
    model.eval()
    with pytest.raises(RuntimeError, match="must not go through a forward pass in evaluation mode"):
        model(INPUTS).sum().backward()
    optimizer_of(handle).step()
    model(INPUTS).sum().backward()  # outside of a window it is where the parameters are


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_plain_module(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, handle = trained()
    twin = copied(model)
    x = weights(model)
    for module in (twin, torch.optim.swa_utils.AveragedModel(model)):
        module.train()
        module(INPUTS).sum().backward()
        module.state_dict()
        module.load_state_dict(module.state_dict())
        assert equal(weights(model), x)
    model(INPUTS)
    assert not equal(weights(model), x)
    handle.detach()
    assert equal(weights(twin), x)


def test_a_model_can_be_saved_as_a_whole_while_attached() -> None:
    model, _ = trained()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert equal(weights(loaded), weights(model))
    loaded(INPUTS)
    assert equal(weights(loaded), weights(model))


@pytest.mark.parametrize("what", ["weights", "optimizer", "both", "both, optimizer first"])
def test_loading_in_a_window_loses_and_shifts_nothing(what: str) -> None:
    model, handle = trained()
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer_of(handle).state_dict())
    expected = weights(model)
    train(handle, model, 2)
    x = weights(model)
    model(INPUTS).sum().backward()  # and no step
    if what in ("weights", "both"):
        model.load_state_dict(saved[0])
    if what != "weights":
        optimizer_of(handle).load_state_dict(saved[1])
    if what == "both, optimizer first":
        model.load_state_dict(saved[0])
    if what == "optimizer":
        torch.testing.assert_close(weights(model), x, rtol=0, atol=1e-15)
    else:
        assert equal(weights(model), expected)
    if what.startswith("both"):
        twin, other = trained()
        train(handle, model, 3)
        train(other, twin, 3)
        assert equal(weights(model), weights(twin))


@pytest.mark.parametrize("order", ["attach first", "compile first", "attach what was compiled"])
def test_compiled_modules_look_ahead(order: str) -> None:
    model, twin = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    called: Any
    if order == "attach first":
        handle = attach(model, optimizer)
        called = torch.compile(model, backend="eager")
    else:
        called = torch.compile(model, backend="eager")
        inner = order == "compile first"
        handle = attach(model if inner else called, optimizer)
    train(handle, called, 10, lambda: no_grad_forward(called))
    train(attach(twin), twin, 10)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-12, atol=1e-13)
    plain = make_model()
    train(attach(plain, lookahead_step_size=0.0), plain, 10)
    assert not torch.allclose(weights(plain)[0], weights(twin)[0], rtol=1e-3)


def test_steps_without_a_training_forward_pass_are_warned_of_once() -> None:
    model = make_model().eval()
    handle = attach(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(handle, model, 8)
    [warning] = caught
    assert "does not look ahead: 3 optimizer steps" in str(warning.message)
    trained_model, other = make_model(), None
    other = attach(trained_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, trained_model, 8)
    assert not equal(weights(model), weights(trained_model))


def test_training_in_evaluation_mode_looks_ahead_where_the_handle_is_told() -> None:
    model, twin = make_model().eval(), make_model()
    handle, other = attach(model), attach(twin)
    for _ in range(8):
        handle.extrapolate()
        train(handle, model, 1)
        train(other, twin, 1)
    assert equal(weights(model), weights(twin))


def test_at_average_is_the_average_of_the_iterates_and_gives_them_back() -> None:
    model, handle = trained(0)
    average = weights(model)
    for _ in range(10):
        train(handle, model, 1)
        average = [0.8 * a + 0.2 * x for a, x in zip(average, weights(model), strict=True)]
    x = weights(model)
    with handle.at_average():
        torch.testing.assert_close(weights(model), average, rtol=1e-12, atol=1e-14)
        inside = no_grad_forward(model)
        state = copy.deepcopy(model.state_dict())
        with handle.at_iterate():
            assert equal(weights(model), x)
        torch.testing.assert_close([*state.values()], average, rtol=1e-12, atol=1e-14)
        with pytest.raises(RuntimeError, match="while the parameters hold the average"):
            model(INPUTS)
    assert equal(weights(model), x)
    assert not torch.allclose(inside, no_grad_forward(model), rtol=1e-3)
    with handle.at_average(share=0.25):
        quarter = [x_i + 0.25 * (a - x_i) for x_i, a in zip(x, average, strict=True)]
        torch.testing.assert_close(weights(model), quarter, rtol=1e-12, atol=1e-14)
    with (
        pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"),
        handle.at_average(1.5),
    ):
        pass
    assert equal(weights(model), x)


def test_evaluation_at_the_average_leaves_training_bitwise_the_same() -> None:
    model, twin = make_model(), make_model()
    handle = attach(model, evaluate_at="average", average_share=0.5)
    seen: list[Tensor] = []
    train(handle, model, 20, lambda: seen.append(no_grad_forward(model)))
    other = attach(twin)
    iterates: list[Tensor] = []
    train(other, twin, 20, lambda: iterates.append(no_grad_forward(twin)))
    assert equal(weights(model), weights(twin))
    assert not torch.allclose(seen[-1], iterates[-1], rtol=1e-3)
    with other.at_average(0.5):
        expected = no_grad_forward(twin)
    assert torch.equal(no_grad_forward(model), expected)


def test_an_unrelated_module_and_parameters_are_refused() -> None:
    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="module must own parameters of the optimizer"):
        attach_ema_nesterov(optimizer, other, warmup=0, rest=0)
    with pytest.raises(TypeError, match=r"module must be the torch.nn.Module .* got .*generator"):
        attach_ema_nesterov(optimizer, model.parameters(), warmup=0, rest=0)  # type: ignore[arg-type]  # the wrong type is the test
    attach_ema_nesterov(optimizer, model, warmup=0, rest=0)
    with pytest.raises(RuntimeError, match="SGD must have one lookahead method"):
        attach_ema_nesterov(optimizer, model, warmup=0, rest=0)


class Asks(nn.Module):
    """Has the state of a part as its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).double()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.parts(inputs)
        return outputs

    def get_extra_state(self) -> Any:
        return self.parts[0].state_dict()

    def set_extra_state(self, state: Any) -> None:
        return


def test_state_is_copied_once_also_where_a_part_is_asked_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Asks()
    handle = attach(model)
    train(handle, model, 4)
    x = weights(model)
    loss = model(INPUTS).square().mean()
    y = weights(model)
    num_copies = 0
    copy_value = module_hooks._copy

    def count(value: Any) -> Any:
        nonlocal num_copies
        num_copies += 1
        return copy_value(value)

    monkeypatch.setattr(module_hooks, "_copy", count)
    state = model.state_dict()
    torch.testing.assert_close([state[f"parts.{i}.weight"] for i in range(5)], x[::2])
    torch.testing.assert_close(state["_extra_state"]["weight"], x[0])
    assert num_copies == len(x) + 2  # and those of the extra state
    assert equal(weights(model), y)
    loss.backward()  # nobody looked
    optimizer_of(handle).step()


def test_a_region_of_autocast_keeps_no_weights_of_another_point() -> None:
    """It casts each weight once in a region, unless it is told that the weights changed."""
    model = make_model().float()
    handle = attach(model, torch.optim.SGD(model.parameters(), lr=0.3))
    inputs = INPUTS.float()

    def loss() -> Tensor:
        output: Tensor = model(inputs)
        return output.float().square().mean()

    def cast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    for _ in range(6):
        optimizer_of(handle).zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer_of(handle).step()
    with torch.no_grad(), cast():
        at_iterate = loss().item()
    with torch.no_grad(), handle.at_average(), cast():
        at_average = loss().item()
    with cast():
        ahead = loss().item()
    assert len({at_iterate, at_average, ahead}) == 3
    with cast():
        assert loss().item() == ahead
        with torch.no_grad():
            assert loss().item() == at_iterate
            with handle.at_average():
                assert loss().item() == at_average
            assert loss().item() == at_iterate
        assert loss().item() == ahead


class Agent(nn.Module):
    """A network and a frozen copy of it, which a training step may bring up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = make_model(), make_model().requires_grad_(requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.target(inputs + 0.1)
        loss: Tensor = (self.net(inputs) - 1.0 - 0.9 * wanted).square()
        return loss


@pytest.mark.parametrize("part", ["target", "net", ""])
def test_loading_a_frozen_part_before_the_backward_pass_moves_nothing(part: str) -> None:
    agent = Agent()
    optimizer = torch.optim.SGD(agent.net.parameters(), lr=0.3)
    handle = attach(agent, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        agent(INPUTS).mean().backward()
        optimizer.step()
    iterate = weights(agent.net)
    loss = agent(INPUTS).mean()
    ahead = weights(agent.net)
    agent.get_submodule(part).load_state_dict(agent.get_submodule(part).state_dict())
    loaded = weights(agent.net)
    if part == "target":
        assert all(map(torch.equal, loaded, ahead))
        optimizer.zero_grad()
        loss.backward()
    else:
        assert max((a - b).abs().max() for a, b in zip(loaded, iterate, strict=True)) < 1e-14
    handle.detach()


def test_a_parameter_that_leaves_its_group_in_a_window_returns_to_the_iterate() -> None:
    model = make_model()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    handle = attach(model, optimizer)
    train(handle, model, 4)
    before = weights(model)
    optimizer.zero_grad()
    model(INPUTS).square().mean().backward()
    optimizer.param_groups[-1]["params"] = []
    optimizer.step()
    [*_, last] = model.parameters()
    assert (last - before[-1]).abs().max() < 1e-14
    handle.detach()
