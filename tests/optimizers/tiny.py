"""A tiny language model, its gradients, and what the tests of all optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_ema_nesterov.optimizers import (
    APOLLO,
    SCALE,
    ClippedSGD,
    Fira,
    GaLore,
    LoRAPre,
    groups_by_role,
)
from tests.toys import snapshot

VOCAB, WIDTH, HIDDEN = 13, 8, 12
Make = Callable[[Any], Optimizer]

# Projections are refreshed every third step here, within a few steps of any test.
OPTIMIZERS: dict[str, Make] = {
    "scale": lambda groups: SCALE(groups, lr=1e-2, adam_lr=3e-2, weight_decay=0.1),
    "clipped_sgd": lambda groups: ClippedSGD(groups, lr=10.0, update_limit=5e-3),
    "galore": lambda groups: GaLore(groups, rank=3, update_proj_gap=3, weight_decay=0.1),
    "fira": lambda groups: Fira(groups, rank=3, update_proj_gap=3, weight_decay=0.1),
    "apollo": lambda groups: APOLLO(groups, rank=3, update_proj_gap=3, weight_decay=0.1),
    "apollo_svd": lambda groups: APOLLO(groups, rank=3, update_proj_gap=3, proj="svd"),
    "apollo_mini": lambda groups: APOLLO(
        groups, rank=1, update_proj_gap=3, scale=4, scale_type="tensor"
    ),
    "lora_pre": lambda groups: LoRAPre(groups, lr=1e-2, rank=3, weight_decay=0.1),
    "lora_pre_muon": lambda groups: LoRAPre(groups, lr=1e-2, rank=3, form="muon"),
}


class TinyLM(nn.Module):
    """Embedding, a normalized two-layer network with a residual, and a head."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wte = nn.Embedding(VOCAB, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, HIDDEN)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.lm_head(x)  # type: ignore[no-any-return]


def loss_of(model: nn.Module, step_idx: int) -> Tensor:
    """The loss of the batch of a step."""
    generator = torch.Generator().manual_seed(step_idx)
    tokens = torch.randint(VOCAB, (4, 7), generator=generator)
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: nn.Module, optimizer: Optimizer, num_steps: int, *, start: int = 0
) -> list[Tensor]:
    """Train, and return copies of the parameters."""
    for step_idx in range(start, start + num_steps):
        optimizer.zero_grad()
        loss_of(model, step_idx).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return snapshot(model)


def started(name: str, **kwargs: Any) -> tuple[TinyLM, Optimizer]:
    """A new model and one of the optimizers."""
    model = TinyLM(**kwargs)
    return model, OPTIMIZERS[name](groups_by_role(model))


def state_elements(optimizer: Optimizer, p: Tensor) -> int:
    """Elements of a parameter's state, without scalars: counts, norms and seeds."""
    return sum(t.numel() for t in optimizer.state[p].values() if t.ndim > 0)


def random_gradients(params: Sequence[Tensor], step_idx: int) -> list[Tensor]:
    """Gradients of a step, the same for every call, of changing size."""
    generator = torch.Generator().manual_seed(100 + step_idx)
    size = 0.1 * (1 + step_idx % 4)
    return [
        size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for p in params
    ]
