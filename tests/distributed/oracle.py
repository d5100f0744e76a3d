"""What every run is compared with in the end: the paper's loop on the same model and batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.distributed.models import Net, Tokens
from tests.distributed.processes import Result


def oracle(accumulate: int = 1, *, resting: Sequence[int] = ()) -> Result:
    """Eight steps of the paper's loop in float64, with step size 0 where it rests."""
    net = Net(dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]
    tokens = Tokens(2 * accumulate)

    def gradients(params: list[Tensor], step_idx: int) -> Sequence[Tensor]:
        named = dict(zip(names, params, strict=True))
        window = range(step_idx * accumulate, (step_idx + 1) * accumulate)
        with torch.enable_grad():
            losses = [functional_call(net, named, tokens[i % len(tokens)]) for i in window]
            return torch.autograd.grad(torch.stack(losses).mean(), params)

    trajectory, directions = reference.train(
        [p.detach() for p in net.parameters()],
        gradients,
        lambda params: torch.optim.AdamW(params, lr=1e-2),
        num_steps=8,
        ema_decay=0.9,
        step_size=lambda t: 0.0 if t == 0 or t in resting else 0.5,
    )
    tensors = {f"weight.{n}": x for n, x in zip(names, trajectory[-1], strict=True)}
    tensors |= {f"{DIRECTION_KEY}.{n}": m for n, m in zip(names, directions, strict=True)}
    return {"tensors": tensors}
