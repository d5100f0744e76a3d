r"""EMA-Nesterov where theory says what to expect: quadratics, logistic regression, and noise.

With gradient descent of step :math:`1/L`, condition number :math:`\kappa = L / \mu` and
:math:`s = \sqrt{(1 - \gamma) / \kappa}`, the lookahead step size

.. math:: \beta = \frac{(1 - \gamma - s)(s - 1/\kappa)}{(1 - 1/\kappa)(1 - \gamma)\, s}

contracts every quadratic by :math:`1 - s` a step, for :math:`\gamma < 1 - 1/\kappa`. One step of
memory, :math:`\gamma = 0`, is the fastest, and is Nesterov's method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.experiments.tables import format_table
from lightning_ema_nesterov.rules.ema import EMADirections

__all__ = ["ConvexResult", "convex_step_size", "run_convex"]

Loss = Callable[[Tensor], Tensor]
EMA_DECAYS = (0.0, 0.5, 0.9)
CONDITIONS = (10.0, 100.0, 1000.0)
NUM_DIMENSIONS = 50
NUM_NOISY_STEPS = 4000


@dataclass(frozen=True)
class ConvexResult:
    """One problem with one EMA decay; gradient descent has neither decay nor step size.

    Attributes:
        problem: ``quadratic``, ``logistic`` or ``noisy quadratic``.
        condition: Condition number.
        ema_decay: Weight of the past; ``None`` for gradient descent.
        step_size: Lookahead step size.
        expected: Contraction of the distance in a step by theory; for noise ``None``.
        measured: Contraction that was measured; for noise the mean excess loss over that of
            gradient descent.
    """

    problem: str
    condition: float
    ema_decay: float | None
    step_size: float
    expected: float | None
    measured: float


def convex_step_size(condition: float, ema_decay: float) -> tuple[float, float]:
    """Return the lookahead step size of the theory, and the contraction that it promises.

    Args:
        condition: Condition number, above 1.
        ema_decay: Weight of the past, in [0, ``1 - 1 / condition``).

    Example:
        >>> convex_step_size(9.0, 0.0)  # Nesterov's (sqrt(9) - 1) / (sqrt(9) + 1)
        (0.5, 0.6666666666666667)
    """
    if not 0 <= ema_decay < 1 - 1 / condition:
        raise ValueError(f"ema_decay must be in [0, {1 - 1 / condition:g}), got {ema_decay}.")
    s = math.sqrt((1 - ema_decay) / condition)
    numerator = (1 - ema_decay - s) * (s - 1 / condition)
    step_size = numerator / ((1 - 1 / condition) * (1 - ema_decay) * s)
    return round(step_size, 15), 1 - s


def run_convex(out: Path) -> list[ConvexResult]:
    """Measure all problems, print a table, and write JSON lines.

    Args:
        out: The file; its folder is made.
    """
    results = [
        *(r for condition in CONDITIONS for r in _contractions(*_quadratic(condition))),
        *_contractions(*_logistic()),
        *_noisy(100.0),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    rows = [["problem", "condition", "EMA decay", "step size", "theory", "measured"]]
    rows += [_row(result) for result in results]
    print(f"{format_table(rows)}\n\nFigures: {out}")
    return results


def _row(result: ConvexResult) -> list[str]:
    return [
        result.problem,
        f"{result.condition:.4g}",
        "none" if result.ema_decay is None else f"{result.ema_decay:g}",
        f"{result.step_size:.3f}",
        "" if result.expected is None else f"{result.expected:.4f}",
        f"{result.measured:.4f}",
    ]


def _quadratic(condition: float) -> tuple[str, Loss, float, Tensor]:
    curvature = torch.logspace(-math.log10(condition), 0, NUM_DIMENSIONS, dtype=torch.float64)
    return (
        "quadratic",
        lambda x: 0.5 * (curvature * x.square()).sum(),
        condition,
        torch.zeros(NUM_DIMENSIONS, dtype=torch.float64),
    )


def _logistic() -> tuple[str, Loss, float, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 0, NUM_DIMENSIONS, dtype=torch.float64)
    inputs = scales * torch.randn(500, NUM_DIMENSIONS, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, generator=generator, dtype=torch.float64)
    signs = torch.sign(inputs.sum(dim=1) + noise)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.softplus(-signs * (inputs @ x)).mean() + 0.005 * x.square().sum()

    optimum = torch.zeros(NUM_DIMENSIONS, dtype=torch.float64)
    for _ in range(30):  # Newton's method
        x = optimum.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(x), x)[0]
        optimum = optimum - torch.linalg.solve(_hessian(loss, optimum), gradient)
    curvatures = torch.linalg.eigvalsh(_hessian(loss, optimum))
    largest = float(curvatures[-1])
    return "logistic", lambda x: loss(x) / largest, largest / float(curvatures[0]), optimum


def _hessian(loss: Loss, x: Tensor) -> Tensor:
    found = torch.autograd.functional.hessian(loss, x)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)  # noqa: S101  # for the type checker
    return found


def _contractions(
    problem: str, loss: Loss, condition: float, optimum: Tensor
) -> list[ConvexResult]:
    """Start near the optimum and measure how the distance shrinks over the second half."""
    found = []
    for ema_decay in (None, *EMA_DECAYS):
        if ema_decay is not None and ema_decay >= 1 - 1 / condition:
            continue
        step_size, expected = (
            (0.0, 1 - 1 / condition)
            if ema_decay is None
            else convex_step_size(condition, ema_decay)
        )
        num_steps = round(12.0 / -math.log(expected))
        start = optimum + 1e-3 / math.sqrt(NUM_DIMENSIONS)
        path = _train(loss, start, num_steps, step_size, ema_decay or 0.0)
        first, last = (float((path[idx] - optimum).norm()) for idx in (num_steps // 2, -1))
        measured = (last / first) ** (1 / (num_steps - num_steps // 2))
        found.append(ConvexResult(problem, condition, ema_decay, step_size, expected, measured))
    return found


def _noisy(condition: float) -> list[ConvexResult]:
    """Add noise to each gradient and compare the loss at which training levels off."""
    _, loss, _, optimum = _quadratic(condition)
    floors = {}
    for ema_decay in (None, *EMA_DECAYS):
        step_size = 0.0 if ema_decay is None else convex_step_size(condition, ema_decay)[0]
        path = _train(loss, optimum, NUM_NOISY_STEPS, step_size, ema_decay or 0.0, noise=1.0)
        losses = [float(loss(x)) for x in path[NUM_NOISY_STEPS // 4 :]]
        floors[ema_decay] = (step_size, sum(losses) / len(losses))
    base = floors[None][1]
    return [
        ConvexResult("noisy quadratic", condition, ema_decay, step_size, None, floor / base)
        for ema_decay, (step_size, floor) in floors.items()
    ]


def _train(
    loss: Loss,
    start: Tensor,
    num_steps: int,
    step_size: float,
    ema_decay: float,
    *,
    noise: float = 0.0,
) -> list[Tensor]:
    """Gradient descent of step 1 with EMA-Nesterov; the largest curvature must be 1."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([x], lr=1.0)
    directions = EMADirections(optimizer, ema_decay)
    lookahead = Lookahead(directions, LookaheadSchedule(step_size)).attach()
    path = [start]
    for _ in range(num_steps):
        lookahead.extrapolate()
        [gradient] = torch.autograd.grad(loss(x), x)
        x.grad = gradient + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        optimizer.step()
        path.append(x.detach().clone())
    return path
