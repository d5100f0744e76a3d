"""A small regression in float64, as a plain module that every trainer can call, and its oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from tests.core import reference

NUM_EXAMPLES = 4
"""All of them are in each optimizer step, so that the order in which a trainer draws them and how
it cuts them into micro-batches do not matter."""

EMA_DECAY = 0.9
STEP_SIZE = 0.5


class Net(nn.Module):
    """Two layers; the loss is computed inside, as Hugging Face's Trainer wants it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Linear(4, 8, bias=False, dtype=dtype)
        self.out = nn.Linear(8, 2, bias=False, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.hidden(inputs)))
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def examples(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(NUM_EXAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)
    return [{"inputs": row[:4], "labels": row[4:]} for row in data]


def whole_batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rows = examples(dtype)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def loss_at(params: Sequence[Tensor]) -> Tensor:
    names = [name for name, _ in Net().named_parameters()]
    named = dict(zip(names, params, strict=True))
    result: dict[str, Tensor] = functional_call(Net(), named, kwargs=whole_batch())
    return result["loss"]


def adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)


def oracle(
    num_steps: int,
    *,
    step_size: Callable[[int], float] = lambda _: STEP_SIZE,
    make_optimizer: Callable[[list[Tensor]], Optimizer] = adamw,
    make_scheduler: Any = None,
) -> list[list[Tensor]]:
    """Return the iterates of the slow loop in float64."""

    def gradients(params: list[Tensor], step_idx: int) -> Sequence[Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(loss_at(params), params)

    iterates, _ = reference.train(
        [p.detach() for p in Net().parameters()],
        gradients,
        make_optimizer,
        num_steps=num_steps,
        ema_decay=EMA_DECAY,
        step_size=step_size,
        make_scheduler=make_scheduler,
    )
    return iterates


def averages(iterates: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The exponential averages of iterates that were seen."""
    average = [x.clone() for x in iterates[0]]
    found = [average]
    for iterate in iterates[1:]:
        rows = zip(average, iterate, strict=True)
        average = [EMA_DECAY * a + (1 - EMA_DECAY) * x for a, x in rows]
        found.append(average)
    return found


def check(actual: Iterable[Tensor], num_steps: int, **kwargs: Any) -> None:
    """Assert that parameters are the oracle's, and that the base optimizer alone leads elsewhere.

    The tolerance is what sums in another order leave in float64.
    """
    params = [p.detach() for p in actual]
    torch.testing.assert_close(params, oracle(num_steps, **kwargs)[-1], rtol=1e-10, atol=1e-12)
    alone = oracle(num_steps, **{**kwargs, "step_size": lambda _: 0.0})[-1]
    assert max(float((p - x).abs().max()) for p, x in zip(params, alone, strict=True)) > 1e-4
