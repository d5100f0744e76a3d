"""Fixtures of the tests of the core."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch.optim import Optimizer

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.ema import EMADirections
from lightning_ema_nesterov.rules.ema_joined import JoinedDirections
from tests.core.problem import Attach

FORMS: dict[str, Callable[..., EMADirections]] = {
    "separate passes": EMADirections,
    "joined passes": JoinedDirections,
    "one pass": partial(JoinedDirections, ends_late=True),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """The name of a form of the same arithmetic."""
    return str(request.param)


@pytest.fixture
def attach(form: str) -> Attach:
    """Attach each form of the rule in turn, with a decay that acts within few steps."""

    def attach_form(
        optimizer: Optimizer,
        *,
        ema_decay: float = 0.9,
        lookahead_step_size: float = 0.5,
        **schedule: Any,
    ) -> Lookahead:
        rule = FORMS[form](optimizer, ema_decay)
        return Lookahead(rule, LookaheadSchedule(lookahead_step_size, **schedule)).attach()

    return attach_form
