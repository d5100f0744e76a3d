"""What is refused, with a message that names the argument, the rule, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback
from tests.toys import Toy, adamw, equal, loader, make_trainer, snapshot


def test_the_base_of_the_callbacks_cannot_be_made() -> None:
    """It has no method to train with: a subclass says which."""
    with pytest.raises(TypeError, match="abstract"):
        LookaheadCallback()  # type: ignore[abstract]  # what this test is about


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lookahead_step_size": 1.0}, r"lookahead_step_size must be in \(-1, 1\), got 1.0"),
        ({"lookahead_step_size": -1.0}, r"lookahead_step_size must be in \(-1, 1\), got -1.0"),
        ({"lookahead_step_size": "0.5"}, r"lookahead_step_size must be in \(-1, 1\), got '0.5'"),
        ({"ema_decay": 1}, r"ema_decay must be in \[0, 1\), got 1"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), got -0.1"),
        ({"ema_decay": "0.9"}, r"ema_decay must be in \[0, 1\), got '0.9'"),
        ({"warmup": -1}, "warmup must be at least 0 optimizer steps, got -1"),
        ({"rest": 1.5}, r"rest must be in \[0, 1\] as a fraction of the run \(a float\), got 1.5"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMANesterov(**kwargs)


@pytest.mark.parametrize(
    ("callback", "trainer_kwargs", "message"),
    [
        (EMANesterov(warmup=8, rest=3), {"max_steps": 10}, r"got 8 \+ 3 steps in a run of 10"),
        (EMANesterov(), {"max_epochs": -1}, "warmup = 0.3 is a fraction of the run"),
        (EMANesterov(warmup=0, rest=5), {"max_epochs": -1}, "rest = 5 counts from the end"),
    ],
)
def test_schedule_that_does_not_fit_the_run_is_refused(
    callback: EMANesterov, trainer_kwargs: dict[str, Any], message: str
) -> None:
    module = Toy(adamw)
    before = snapshot(module)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callback, **trainer_kwargs).fit(module, loader(20))
    assert equal(before, snapshot(module))


@pytest.mark.parametrize("strategy", ["DeepSpeedStrategy", "SingleDeviceXLAStrategy"])
def test_unsupported_strategies_are_refused(strategy: str) -> None:
    trainer = make_trainer(EMANesterov(), max_steps=10)
    trainer.strategy.__class__ = type(strategy, (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match=f"does not support {strategy}"):
        trainer.fit(Toy(adamw), loader(10))


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match="One lookahead callback must be in the list, got 2"
    ):
        make_trainer([EMANesterov(), EMANesterov()], max_steps=10).fit(Toy(adamw), loader(10))


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_module_without_optimizer_is_refused() -> None:
    class Empty(Toy):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(MisconfigurationException, match="needs an optimizer"):
        make_trainer(EMANesterov(), max_steps=10).fit(Empty(adamw), loader(10))


class Duck:
    """Has what Lightning asks of an optimizer, and is none of torch."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.defaults: dict[str, Any] = {}
        self.state: dict[Any, Any] = {}

    def step(self, closure: Any = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def test_optimizer_that_is_not_of_torch_is_refused() -> None:
    module = Toy(Duck)  # type: ignore[arg-type]  # what this test is about
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got .*Duck"):
        make_trainer(EMANesterov(), max_steps=10).fit(module, loader(10))


@pytest.mark.parametrize(
    "kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 5, "rest": 5}, {"warmup": 1.0, "rest": 0}]
)
def test_configuration_that_does_nothing_warns_once(kwargs: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="never looks ahead in this run") as record:
        make_trainer(EMANesterov(**kwargs), max_steps=10).fit(Toy(adamw), loader(10))
    assert sum("never looks ahead" in str(w.message) for w in record) == 1
