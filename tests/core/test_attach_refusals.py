"""What an attached module refuses or warns of, because nothing else would be right."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Fabric
from torch import Tensor, nn

from lightning_ema_nesterov import EMANesterov
from tests.core.q_network import (
    NUM_STEPS,
    STATES,
    QNetwork,
    attach,
    attached,
    sgd,
    train_step,
    weights,
)
from tests.toys import Toy, adamw, equal, loader, make_trainer


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("part", ["", "head"])
def test_a_copy_of_the_lookahead_point_is_refused(
    copied: Callable[[nn.Module], nn.Module], part: str
) -> None:
    model, optimizer, handle = attached()
    of_interest = model.get_submodule(part)
    x = weights(of_interest)
    loss = model(STATES).square().mean()
    y = weights(of_interest)
    assert not equal(x, y)
    with pytest.raises(RuntimeError, match="must not be copied or pickled between a training"):
        copied(of_interest)
    with handle.at_iterate():
        torch.testing.assert_close(weights(copied(of_interest)), x)
    assert equal(weights(of_interest), y)
    loss.backward()
    optimizer.step()
    assert equal(weights(copied(of_interest)), weights(of_interest))


def test_a_new_optimizer_for_an_attached_model_is_refused_until_it_is_detached() -> None:
    """A notebook cell that makes the optimizer too, run twice."""
    model, _, handle = attached()
    x = weights(model)
    other = sgd(model.parameters())
    with pytest.raises(RuntimeError, match=r"one lookahead method, and 6 of 6 are moved for ano"):
        attach(other, model)
    assert equal(weights(model), x)
    handle.detach()
    attach(other, model)
    train_step(model, other)
    model(STATES)
    state = model.state_dict()
    other.step()  # with no former window that would be left open
    assert not equal([*state.values()], weights(model))
    assert equal([*model.state_dict().values()], weights(model))


def test_the_callback_refuses_a_module_that_is_attached_by_hand() -> None:
    module = Toy(adamw)
    handle = attach(adamw(module.parameters()), module)
    trainer = make_trainer(EMANesterov(warmup=0, rest=0), max_epochs=1)
    with pytest.raises(RuntimeError, match="A parameter must have one lookahead method"):
        trainer.fit(module, loader(2))
    handle.detach()
    make_trainer(EMANesterov(warmup=0, rest=0), max_epochs=1).fit(module, loader(2))


def test_one_graph_around_the_moves_is_refused_with_what_to_attach() -> None:
    torch._dynamo.reset()
    model = QNetwork()
    attach(sgd(model.parameters()), model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"(attach to what torch.compile returns|_before_forward)"):
        compiled(STATES)


@pytest.mark.parametrize("kwargs", [{}, {"compile": True}, {"direction_dtype": "int8"}], ids=str)
def test_a_backward_pass_through_activations_of_the_former_point_is_an_error(
    kwargs: dict[str, Any],
) -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    attach(optimizer, model, **kwargs)
    for _ in range(3):
        train_step(model, optimizer)
    features = model.head(model.norm(model.encoder(STATES)))  # parts, before the module is called
    loss = model(STATES).square().mean() + features.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_pass_after_a_look_that_raised_is_refused() -> None:
    model, optimizer, handle = attached()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    loss = model(STATES).square().mean()
    for register in (model.norm.register_forward_hook, model.head.register_state_dict_post_hook):
        hook = register(fail)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            [model(STATES), model.state_dict()]
        hook.remove()
        with pytest.raises(RuntimeError, match="while the parameters hold the iterate"):
            loss.backward()
        loss = model(STATES).square().mean()
    with handle.at_iterate(), pytest.raises(RuntimeError, match="hold the iterate"):
        loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("then", ["train", "evaluate", "state_dict", "load_state_dict"])
def test_an_evaluation_at_the_average_that_is_interrupted_is_left(
    then: str, is_wrapped: bool
) -> None:
    """Ctrl-C in a notebook; torch calls no hook for it."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    def run(*, interrupts: bool) -> list[Tensor]:
        model = QNetwork()
        optimizer = sgd(model.parameters())
        outer = Fabric(accelerator="cpu", devices=1).setup(model) if is_wrapped else model
        attach(optimizer, outer, evaluate_at="average")
        for _ in range(3):
            train_step(outer, optimizer)
        if interrupts:
            hook = model.norm.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                outer(STATES)
            hook.remove()
        if then == "train":
            train_step(outer, optimizer)
        elif then == "evaluate":
            with torch.no_grad():
                outer(STATES)
        else:
            state = outer.state_dict()
            assert equal([*state.values()], weights(model))
            if then == "load_state_dict":
                outer.load_state_dict(state)
        return weights(model)

    assert equal(run(interrupts=True), run(interrupts=False))


@pytest.mark.parametrize("evaluate_at", ["iterate", "average"])
def test_blocks_after_an_interrupted_evaluation_hold_what_they_say(evaluate_at: str) -> None:
    model, optimizer, handle = attached()
    handle.detach()
    handle = attach(optimizer, model, evaluate_at=evaluate_at)
    x = weights(model)
    with handle.at_average(0.5):
        half = weights(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    def interrupted_evaluation() -> None:
        hook = model.norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(STATES)
        hook.remove()

    for block, expected in ((lambda: handle.at_average(0.5), half), (handle.at_iterate, x)):
        interrupted_evaluation()
        with block(), torch.no_grad():
            assert equal(weights(model), expected)
            model(STATES)
            assert equal(weights(model), expected)
        assert equal(weights(model), x)
    interrupted_evaluation()
    if evaluate_at == "average":
        with pytest.raises(RuntimeError, match="The copy of the module holds the average"):
            copy.deepcopy(model)
    assert equal(weights(copy.deepcopy(model)), x)


def test_inside_of_at_iterate_nothing_else_is_seen() -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model, evaluate_at="average")
    for _ in range(3):
        train_step(model, optimizer)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        at_average = model(STATES)
        with handle.at_iterate():
            assert torch.equal(model(STATES), plain(STATES))
        assert torch.equal(model(STATES), at_average)
        assert not torch.allclose(at_average, plain(STATES), rtol=1e-3)
    for train in (lambda: model(STATES), handle.extrapolate):
        with (
            handle.at_iterate(),
            pytest.raises(RuntimeError, match=r"must not run inside of at_iterate\(\)"),
        ):
            train()
    assert equal(weights(model), weights(plain))
    train_step(model, optimizer)
    assert not equal(weights(model), weights(plain))


class Puts(nn.Module):
    """Puts out its weight as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        return factor * self.weight.square().sum(), self.weight


def test_a_parameter_that_is_put_out_as_it_is_can_be_trained_after_an_evaluation() -> None:
    model = Puts()
    optimizer = sgd(model.parameters())
    attach(optimizer, model)
    for _ in range(3):
        loss, weight = model(torch.ones(()))
        model.eval()
        model(torch.ones(()))
        model.train()
        (loss + weight.sum()).backward()
        optimizer.step()
    assert not model.weight._backward_hooks


def test_a_schedule_that_never_looks_ahead_is_warned_of() -> None:
    model = QNetwork()
    with pytest.warns(UserWarning, match="never looks ahead in this run, so training equals"):
        attach(sgd(model.parameters()), model, warmup=10, rest=10, total_steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = QNetwork()
        attach(sgd(other.parameters()), other, lookahead_step_size=0.0)


def test_an_optimizer_that_was_pickled_itself_has_lost_its_steps_and_says_so() -> None:
    file = io.BytesIO()
    torch.save(attached()[:2], file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=False)
    with pytest.warns(UserWarning, match=r"SGD has directions .* for 6 parameters and no number"):
        handle = attach(optimizer, model)
    handle.start_at(NUM_STEPS)
    train_step(model, optimizer)
    twin = attached(NUM_STEPS + 1)[0]
    assert equal(weights(model), weights(twin))
    assert not equal(weights(model), weights(attached()[0]))
