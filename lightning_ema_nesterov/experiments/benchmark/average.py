"""What an average of the weights costs: that in the direction, and Lightning's second model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, callbacks
from torch import Tensor, nn

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.experiments.benchmark.measure import (
    EMA_DECAY,
    PausableAdamW,
    peak_bytes,
    shapes_of,
    timed,
)
from lightning_ema_nesterov.rules.ema import EMADirections

__all__ = ["AverageCost", "measure_averages"]

OURS, THEIRS = "EMANesterov", "EMAWeightAveraging"


@dataclass(frozen=True)
class AverageCost:
    """Medians over interleaved rounds, float32 parameters, no lookahead.

    Attributes:
        name: ``EMANesterov``, or ``EMAWeightAveraging`` of Lightning.
        num_elements: Elements of all parameters.
        num_tensors: Parameters.
        num_threads: Threads of torch.
        state_per_element: Bytes that are kept all the time, over those of the parameters.
        evaluating_per_element: Most bytes that are held beside that while the parameters go to the
            average, and as long as they are there.
        step_ms: Time of keeping the average in one optimizer step.
        enter_ms: Time of moving the parameters to the average.
        leave_ms: Time of moving them back.
    """

    name: str
    num_elements: int
    num_tensors: int
    num_threads: int
    state_per_element: float
    evaluating_per_element: float
    step_ms: float
    enter_ms: float
    leave_ms: float

    def as_row(self) -> list[str]:
        """Return the cells of a table."""
        return [
            self.name,
            f"{self.num_elements:,}",
            f"{self.num_tensors:,}",
            f"{self.num_threads}",
            f"{self.state_per_element:.3f}",
            f"{self.evaluating_per_element:.3f}",
            f"{self.step_ms:.1f} ms",
            f"{self.enter_ms:.1f} ms",
            f"{self.leave_ms:.1f} ms",
        ]


@dataclass(frozen=True)
class _Case:
    """Actions, in the order of a run, and the bytes that are kept between them."""

    step: Callable[[], Any]
    enter: Callable[[], Any]
    leave: Callable[[], Any]
    kept_bytes: Callable[[], int]


def measure_averages(
    num_elements: int, num_tensors: int, *, num_rounds: int = 15, device: str = "cpu"
) -> list[AverageCost]:
    """Measure both averages side by side; ours alone where Lightning has none, before 2.6.

    Args:
        num_elements: Elements of all parameters, rounded to what ``num_tensors`` allow.
        num_tensors: Parameters, at least 1.
        num_rounds: Rounds, in each of which everything is timed once; at least 1.
        device: As torch names it.
    """
    shapes = shapes_of(num_elements, num_tensors)
    cases = {OURS: _ours(_model(shapes, device))}
    if hasattr(callbacks, THEIRS):
        cases[THEIRS] = _theirs(_model(shapes, device))
    times: dict[str, dict[str, list[float]]] = {
        name: {"step_ms": [], "enter_ms": [], "leave_ms": []} for name in cases
    }
    for round_idx in range(num_rounds + 2):  # the first two warm up
        for name, case in cases.items():
            actions = (case.step, case.enter, case.leave)
            for action, found in zip(actions, times[name].values(), strict=True):
                with timed(device) as elapsed:
                    action()
                if round_idx >= 2:
                    found.append(1e3 * elapsed[0])
    num_bytes = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    costs = []
    for name, case in cases.items():
        peak = peak_bytes(case.enter, device)
        case.leave()
        costs.append(
            AverageCost(
                name=name,
                num_elements=num_bytes // 4,
                num_tensors=num_tensors,
                num_threads=torch.get_num_threads(),
                state_per_element=case.kept_bytes() / num_bytes,
                evaluating_per_element=peak / num_bytes,
                **{kind: statistics.median(values) for kind, values in times[name].items()},
            )
        )
    return costs


def _model(shapes: Sequence[tuple[int, ...]], device: str) -> LightningModule:
    model = LightningModule()
    params = [nn.Parameter(torch.full(shape, 0.02, device=device)) for shape in shapes]
    model.weights = nn.ParameterList(params)
    return model


def _ours(model: LightningModule) -> _Case:
    params = list(model.parameters())
    optimizer = PausableAdamW(params, lr=1e-6)
    optimizer.is_still = True  # what it would do is not on our account
    for p in params:
        p.grad = torch.zeros((), device=p.device).expand_as(p)  # only whether there is one counts
    lookahead = Lookahead(EMADirections(optimizer, EMA_DECAY), LookaheadSchedule(0.0)).attach()

    def step() -> None:
        lookahead.extrapolate()
        optimizer.step()

    return _Case(
        step,
        lookahead.enter_average,
        lookahead.leave_average,
        lambda: _bytes_of(lookahead.rule.store.tensors(params)),
    )


def _theirs(model: LightningModule) -> _Case:
    callback = callbacks.EMAWeightAveraging(decay=EMA_DECAY)
    no_trainer: Any = None  # of which it needs nothing here
    callback.setup(no_trainer, model, "fit")
    average: Any = callback._average_model
    return _Case(
        lambda: average.update_parameters(model),
        lambda: callback._swap_models(model),
        lambda: callback._swap_models(model),
        lambda: _bytes_of(average.module.parameters()),
    )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
