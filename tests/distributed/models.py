"""The model and the batches that every run trains on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import Dataset

GLOBAL_BATCH = 12
VOCAB, WIDTH = 13, 10  # 13 rows are divided by neither 2 nor 3 processes


class Tokens(Dataset[Tensor]):
    """One process's share of each global batch; those of a tensor-parallel group have the same."""

    def __init__(self, num_batches: int, share_idx: int = 0, num_shares: int = 1) -> None:
        self.share_idx, self.num_shares = share_idx, num_shares
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (num_batches, GLOBAL_BATCH, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Tensor:
        size = GLOBAL_BATCH // self.num_shares
        return self.tokens[idx, self.share_idx * size : (self.share_idx + 1) * size]


class Block(nn.Module):
    """A normalised MLP on the running mean of its inputs, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.cumsum(dim=1) / x.shape[1]
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm(mixed))))
        return out


class Net(nn.Module):
    """Tied embeddings, and parameters that belong to the root itself.

    Args:
        dtype: Of the parameters. The numbers drawn are the same in every dtype.
        has_unused: Whether there is a parameter that never gets a gradient.
        recomputes: Whether blocks forget their activations until the backward pass.
        only_matrices: Whether only matrices are trained, as Muon takes nothing else.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        has_unused: bool = False,
        recomputes: bool = False,
        only_matrices: bool = False,
    ) -> None:
        super().__init__()
        self.recomputes = recomputes
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.temperature = nn.Parameter(torch.ones(1))  # all but one process hold none of it
        if has_unused:
            self.unused = nn.Parameter(torch.ones(3, 2))
        if only_matrices:
            for p in self.parameters():
                p.requires_grad_(p.ndim == 2)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1]) * self.scale
        for block in self.blocks:
            x = recompute(block, x, use_reentrant=False) if self.recomputes else block(x)
        logits = self.head(x) * self.temperature
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
