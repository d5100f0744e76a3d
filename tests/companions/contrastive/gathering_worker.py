"""One of several processes: two steps of EMC2 on its part of a batch. Started by the tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ema_nesterov.companions.contrastive import EMC2Loss

NUM_SAMPLES = 10
BATCHES = ([0, 3, 7, 9], [9, 1, 3, 2], [7, 0, 1, 5])


def steps(chains: str, rank: int, world_size: int, *, gathers: bool = True) -> dict[str, Tensor]:
    """Return the mean gradients of all steps, and the buffers after them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_SAMPLES, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, NUM_SAMPLES, 6, generator=generator, dtype=torch.float64)
    encoder = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        encoder.weight.copy_(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    loss = EMC2Loss(NUM_SAMPLES, 0.5, chains=chains).double()  # type: ignore[arg-type]  # a word

    def encode(samples: Tensor, views: Tensor) -> Tensor:
        features: Tensor = encoder(images[samples] + noise[views, samples])
        return features

    for batch in BATCHES:
        part = torch.tensor(batch).chunk(world_size)[rank]
        out0, out1 = (encode(part, torch.full_like(part, view)) for view in range(2))
        (loss(out0, out1, part, encode) / world_size).backward()
    gradient = encoder.weight.grad
    assert gradient is not None
    if world_size > 1 and gathers:
        dist.all_reduce(gradient)
    return {"gradient": gradient, **loss.state_dict()}


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
    )
    results = {chains: steps(chains, rank, world_size) for chains in ("image", "view")}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
