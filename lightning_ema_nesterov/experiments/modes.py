r"""What EMA-Nesterov does to each mode of a quadratic, beside bases with the same gain.

A mode is one direction in which the loss is :math:`h x^2 / 2`. Gradient descent of step
:math:`\eta` shrinks it by :math:`1 - a` a step, with :math:`a = \eta h`: its time scale is
:math:`1 / a` steps. With :math:`g = 1 - \gamma`, in time measured in memories of :math:`1 / g`
steps, EMA-Nesterov of step size :math:`\beta` moves it, for small :math:`a` and :math:`g`, with the
two rates :math:`\sigma` that solve

.. math:: \sigma^2 - \sigma\,(\alpha + 1 - \beta) + \alpha = 0, \qquad \alpha = a / g.

* Slow modes, :math:`\alpha \to 0`: :math:`\sigma = \alpha / (1 - \beta)`. A larger step.
* Fast modes, :math:`\alpha \to \infty`: :math:`\sigma = \alpha`. The base optimizer.
* From :math:`\alpha = (1 - \sqrt\beta)^2` to :math:`(1 + \sqrt\beta)^2` both are complex, with the
  real part :math:`(\alpha + 1 - \beta) / 2`: the mode swings. It is :math:`1 / (1 - \sqrt\beta)`
  times as fast as with the base at the slow end, and slower than the base where
  :math:`\alpha > 1 - \beta`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.experiments.tables import format_table
from lightning_ema_nesterov.rules.ema import EMADirections

__all__ = ["METHODS", "ModeResult", "Moves", "run_modes"]

STEP_SIZE = 0.5
EMA_DECAY = 0.9
TIME_SCALES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Of the modes under gradient descent. Unit: memories, 10 steps at this EMA decay."""

SETTLED = 0.01
"""Share of the start below which a mode has settled."""

NUM_NOISY_RUNS = 1000
"""Runs of each mode over which the variance is taken."""


@dataclass(frozen=True)
class Moves:
    """A base optimizer, and whether EMA-Nesterov is on it.

    Attributes:
        lr: Learning rate of gradient descent.
        momentum: Its momentum, of the kind whose gain is ``1 / (1 - momentum)``.
        step_size: Lookahead step size.
    """

    lr: float = 1.0
    momentum: float = 0.0
    step_size: float = 0.0


METHODS = {
    "base": Moves(),
    "EMA-Nesterov": Moves(step_size=STEP_SIZE),
    "larger rate": Moves(lr=1.0 / (1.0 - STEP_SIZE)),
    "momentum": Moves(momentum=STEP_SIZE),
}
"""The base, and three with the gain 2 on everything slow."""


@dataclass(frozen=True)
class ModeResult:
    """One mode with one method.

    Attributes:
        method: Name in :data:`METHODS`.
        time_scale: Of the mode under the base. Unit: memories.
        settling_steps: Steps after which it stays below 1 % of its start.
        speed_up: Those of the base over these.
        noise: Its variance under noisy gradients, in the end, over that of the base.
    """

    method: str
    time_scale: float
    settling_steps: int
    speed_up: float
    noise: float


def run_modes(out: Path) -> list[ModeResult]:
    """Measure all modes with all methods, print a table, and write JSON lines.

    Args:
        out: The file; its folder is made.
    """
    curvatures = torch.tensor([(1.0 - EMA_DECAY) / t for t in TIME_SCALES], dtype=torch.float64)
    settled = {name: _settling_steps(moves, curvatures) for name, moves in METHODS.items()}
    noise = {name: _variances(moves, curvatures) for name, moves in METHODS.items()}
    results = [
        ModeResult(
            name,
            time_scale,
            settled[name][idx],
            round(settled["base"][idx] / settled[name][idx], 3),
            round(noise[name][idx] / noise["base"][idx], 3),
        )
        for idx, time_scale in enumerate(TIME_SCALES)
        for name in METHODS
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    rows = [["time scale in memories", "method", "speed-up", "noise"]]
    rows += [
        [f"{r.time_scale:g}", r.method, f"{r.speed_up:.2f}", f"{r.noise:.2f}"] for r in results
    ]
    print(f"\n{format_table(rows)}\n\nFigures: {out}")
    return results


def _settling_steps(moves: Moves, curvatures: Tensor) -> list[int]:
    """Start each mode at 1, and count steps until it stays below the threshold."""
    x = nn.Parameter(torch.ones_like(curvatures))
    step = _stepper(moves, x, lambda point: curvatures * point)
    last = torch.zeros_like(curvatures)
    # Time scales until the slowest mode has settled under the base, 4.6, and some more.
    for idx in range(round(5.5 / float(curvatures.min()))):
        last[x.detach().abs() >= SETTLED] = idx + 1
        step()
    return [int(steps) for steps in last]


def _variances(moves: Moves, curvatures: Tensor) -> list[float]:
    """Add noise to each gradient, and return the variance of each mode over many runs."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.zeros(NUM_NOISY_RUNS, len(curvatures), dtype=torch.float64))

    def noisy(point: Tensor) -> Tensor:
        return curvatures * point + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    step = _stepper(moves, x, noisy)
    # Until the variance of the slowest mode has levelled off.
    for _ in range(round(3.0 / float(curvatures.min()) + 8.0 / (1.0 - EMA_DECAY))):
        step()
    return x.detach().square().mean(dim=0).tolist()


def _stepper(
    moves: Moves, x: nn.Parameter, gradient: Callable[[Tensor], Tensor]
) -> Callable[[], None]:
    """Return a function that takes one step."""
    optimizer = SGD([x], lr=moves.lr, momentum=moves.momentum)
    rule = EMADirections(optimizer, EMA_DECAY)
    lookahead = Lookahead(rule, LookaheadSchedule(moves.step_size)).attach()

    def step() -> None:
        lookahead.extrapolate()
        x.grad = gradient(x.detach())
        optimizer.step()

    return step
