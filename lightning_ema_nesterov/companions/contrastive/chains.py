"""Metropolis-Hastings chains over the candidates of a batch, all anchors at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChainRun", "log_draws", "run_chains"]

# Multipliers of the finalizer of SplitMix64, as signed 64-bit integers.
_FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
_SECOND_FACTOR = 0x94D049BB133111EB - 2**64
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class ChainRun:
    """What a pass over the candidates gave, for ``A`` anchors and ``N`` columns.

    Attributes:
        weights: Share of the kept states that are column ``j``, shape ``(A, N + 1)``; rows sum to
            1. Column ``N`` stands for the state from before the pass, where it is in no column.
        columns: The last state of each chain, a column in ``[0, N]``, shape ``(A,)``.
        log_scores: Its logit, shape ``(A,)``.
    """

    weights: Tensor
    columns: Tensor
    log_scores: Tensor


@torch.no_grad()
def run_chains(
    logits: Tensor,
    is_candidate: Tensor,
    columns: Tensor,
    log_scores: Tensor,
    log_draws: Tensor,
    *,
    burn_in: float,
) -> ChainRun:
    r"""Move each chain through its candidates, in the order of the columns.

    Candidate :math:`c` replaces the state :math:`z` of anchor :math:`x` with probability

    .. math:: \min(1, \exp(\ell(x, c) - \ell(x, z))),

    which leaves :math:`p_x \propto \exp \ell(x, \cdot)` unchanged when candidates are uniform. The
    states after each of the last candidates are kept, with repeats.

    Args:
        logits: :math:`\ell`, cosine over temperature, shape ``(A, N)``.
        is_candidate: Which columns an anchor may move to, shape ``(A, N)``, at least one in a row.
        columns: States at the start, in ``[0, N]``, shape ``(A,)``; ``N`` is one in no column.
        log_scores: Their logits, shape ``(A,)``; ``-inf``: no state yet, the first candidate is
            taken.
        log_draws: Logarithms of uniform draws, shape ``(A, N)``.
        burn_in: Share of an anchor's candidates, in [0, 1), that only move the chain.

    Returns:
        Weights of the kept states, last states and their logits.

    Example:
        >>> logits, draws = torch.tensor([[0.0, 2.0, 1.0]]), torch.full((1, 3), -0.5)
        >>> run = run_chains(logits, torch.tensor([[False, True, True]]), torch.tensor([3]),
        ...     torch.tensor([-torch.inf]), draws, burn_in=0.0)
        >>> run.weights, run.columns, run.log_scores
        (tensor([[0., 1., 0., 0.]]), tensor([1]), tensor([2.]))
    """
    num_columns = logits.shape[1]
    # A candidate is taken iff log u < logit - score; one that is none has the logit -inf.
    thresholds = torch.where(is_candidate, logits - log_draws, -torch.inf).T.contiguous()
    rows = logits.T.contiguous()
    states = []
    for column, (threshold, row) in enumerate(zip(thresholds.unbind(), rows.unbind(), strict=True)):
        accepted = threshold > log_scores
        columns = torch.where(accepted, column, columns)
        log_scores = torch.where(accepted, row, log_scores)
        states.append(columns)
    kept = _are_kept(is_candidate, burn_in).to(logits.dtype)
    counts = logits.new_zeros(len(logits), num_columns + 1)
    counts.scatter_add_(1, torch.stack(states, dim=1), kept)
    return ChainRun(counts / kept.sum(dim=1, keepdim=True), columns, log_scores)


def log_draws(anchors: Tensor, num_columns: int, step: Tensor) -> Tensor:
    """Return logarithms of uniform draws, each a hash of its anchor, its column and the step.

    No generator is kept: a run that goes on from a checkpoint, on any device and with the batch cut
    over any number of processes, draws the same.

    Args:
        anchors: Number of each anchor, unique in the data set, shape ``(A,)``.
        num_columns: How many draws an anchor needs.
        step: Steps before this one plus the seed, a scalar of int64.

    Returns:
        Shape ``(A, num_columns)``, float32, below 0.

    Example:
        >>> draws = log_draws(torch.arange(1000), 100, torch.tensor(0)).exp()
        >>> round(draws.mean().item(), 2), round(draws.std().item(), 2)  # 1/2 and sqrt(1/12)
        (0.5, 0.29)

    References:
        Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014.
    """
    keys = _mix(_mix(step) + anchors)
    columns = torch.arange(1, num_columns + 1, device=anchors.device)
    bits = _mix(keys.unsqueeze(1) + columns * _INCREMENT)
    # The upper 24 bits, which float32 holds exactly; half a unit keeps the logarithm finite.
    return _shift(bits, 40).float().add_(0.5).mul_(2.0**-24).log_()


def _are_kept(is_candidate: Tensor, burn_in: float) -> Tensor:
    number = is_candidate.cumsum(dim=1)  # 1 for an anchor's first candidate
    total = number[:, -1:]
    num_dropped = (total * burn_in).floor().minimum(total - 1)
    return is_candidate & (number > num_dropped)


def _mix(x: Tensor) -> Tensor:
    """Scatter 64-bit integers over all integers, one to one; products wrap around."""
    x = (x ^ _shift(x, 30)) * _FIRST_FACTOR
    x = (x ^ _shift(x, 27)) * _SECOND_FACTOR
    return x ^ _shift(x, 31)


def _shift(x: Tensor, num_bits: int) -> Tensor:
    """Shift right without the sign, which torch would copy."""
    shifted: Tensor = (x >> num_bits) & (2 ** (64 - num_bits) - 1)
    return shifted
