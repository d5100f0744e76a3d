"""The arguments of EMA-Nesterov: one definition, for every way to use it."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.rules.make import DEFAULTS, Settings


@pytest.mark.parametrize("made_by", [EMANesterov, attach_ema_nesterov])
def test_every_way_has_the_same_arguments_and_defaults(made_by: Callable[..., object]) -> None:
    own = {"optimizer", "module", "ends_late"}
    parameters = inspect.signature(made_by).parameters
    found = {name: p.default for name, p in parameters.items() if name not in own}
    assert found == {field.name: getattr(DEFAULTS, field.name) for field in fields(Settings)}


@pytest.mark.parametrize("module", ["callback", "attach"])
def test_every_argument_is_passed_on(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own name as its value."""
    caught: list[dict[str, Any]] = []

    def catch(lookahead_step_size: str, ema_decay: str, **kwargs: str) -> None:
        caught.append(dict(lookahead_step_size=lookahead_step_size, ema_decay=ema_decay, **kwargs))
        raise InterruptedError

    imported = importlib.import_module(f"lightning_ema_nesterov.{module}")
    monkeypatch.setattr(imported, "Settings", catch)
    layer = torch.nn.Linear(2, 1)
    ways: dict[str, Callable[..., object]] = {
        "callback": EMANesterov,
        "attach": partial(attach_ema_nesterov, torch.optim.SGD(layer.parameters(), 0.1), layer),
    }
    names = {field.name: field.name for field in fields(Settings)}
    with pytest.raises(InterruptedError):
        ways[module](**names)
    assert caught == [names]


def test_defaults_are_those_of_the_documentation() -> None:
    assert (DEFAULTS.lookahead_step_size, DEFAULTS.ema_decay) == (0.5, 0.99)
    assert (DEFAULTS.warmup, DEFAULTS.rest) == (0.3, 0.15)
    assert (DEFAULTS.evaluate_at, DEFAULTS.scale_with_lr) == ("iterate", True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"lookahead_step_size": 1.0},
            ValueError,
            r"lookahead_step_size must be in \(-1, 1\)",
        ),
        ({"lookahead_step_size": -1}, ValueError, r"lookahead_step_size must be in \(-1, 1\)"),
        ({"lookahead_step_size": math.nan}, ValueError, r"must be in \(-1, 1\), got nan"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0 optimizer steps, got -1"),
        (
            {"warmup": "10%"},
            ValueError,
            "a number of steps or a fraction, got '10%'",
        ),
        ({"rest": -0.5}, ValueError, r"rest must be in \[0, 1\] as a fraction of the run"),
        ({"rest": 150.0}, ValueError, "Give a number of optimizer steps as an int"),
        ({"warmup": True}, ValueError, "warmup must be a number of steps or a fraction, got True"),
        ({"warmup": 0.6, "rest": 0.5}, ValueError, r"warmup \+ rest must be at most 1"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"total_steps": "100"}, TypeError, "total_steps must be a number .* got '100'"),
        ({"total_steps": 100.5}, TypeError, "total_steps must be a number .* got 100.5"),
        ({"compile": "yes"}, TypeError, "compile must be True or False, got 'yes'"),
        ({"direction_dtype": "fp8"}, ValueError, "one of 'float32', 'bfloat16', 'int8', got 'fp8'"),
        (
            {"direction_dtype": "int8", "compile": True},
            ValueError,
            "compile=True must go with direction_dtype='float32'",
        ),
    ],
)
def test_wrong_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Settings(**kwargs)


def test_arguments_at_the_ends_of_their_ranges_are_taken() -> None:
    Settings(-0.99, 0.0, warmup=0, rest=0.0)
    Settings(0.99, 0.999, warmup=0.7, rest=0.3, total_steps=1)
    Settings(warmup=10**6, rest=10**6)  # what fits, the run decides
