"""A small language model, called in a loop without LitGPT."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Language(nn.Module):
    """A model with a head that can be tied, called in a loop without LitGPT."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        if is_tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(self.hidden(self.embedding(ids))))
        return logits


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 6) -> list[Tensor]:
    """Train, and return the weights and the loss of each forward pass."""
    ids = torch.arange(8).reshape(2, 4)
    losses = []
    for step_idx in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * (1 - step_idx / num_steps)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*(p.detach().clone() for p in model.parameters()), *losses]


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch wrote no types for it
