"""The contrastive loss with its whole softmax, over what it is given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["check_temperature", "check_views", "contrastive_loss"]


def contrastive_loss(
    out0: Tensor, out1: Tensor, temperature: float = 0.07, *, positive_in_sum: bool = False
) -> Tensor:
    r"""Return the contrastive loss of two views, with the samples given as negatives.

    .. math:: L = \operatorname{mean}_x \Big[ -s(x, y) / \tau + \log \sum_{z \in D^-(x)}
        \exp(s(x, z) / \tau) \Big], \quad s = \cos

    The anchor :math:`x` runs over both views, :math:`y` is the other view of its sample, and
    :math:`D^-(x)` holds both views of all other samples. Of a whole data set this is the loss whose
    gradient :class:`EMC2Loss` estimates; of a batch it is the in-batch softmax.

    Args:
        out0: Features of the first views, shape ``(B, d)``, at least two samples.
        out1: Features of the second views, likewise.
        temperature: :math:`\tau`, above 0.
        positive_in_sum: Whether :math:`y` is in the sum too, as in SimCLR (NT-Xent).

    Raises:
        ValueError: If the temperature is not above 0, or shapes do not fit.

    Example:
        >>> views = torch.eye(3)
        >>> contrastive_loss(views, views, temperature=1.0)  # -1 + log(4 exp(0))
        tensor(0.3863)
    """
    check_temperature(temperature)
    check_views(out0, out1)
    if len(out0) < 2:
        raise ValueError(
            f"out0 and out1 must hold at least 2 samples, got {len(out0)}: the negatives of a "
            "sample are the others. Use a larger batch."
        )
    features = normalize(torch.cat([out0, out1]), dim=1)
    logits = features @ features.T / temperature
    num_samples = len(out0)
    positives = torch.cat([logits.diagonal(num_samples), logits.diagonal(-num_samples)])
    samples = torch.arange(num_samples, device=out0.device).repeat(2)
    is_left_out = samples.unsqueeze(1) == samples
    if positive_in_sum:
        is_left_out = torch.eye(2 * num_samples, dtype=torch.bool, device=out0.device)
    negatives = logits.masked_fill(is_left_out, -torch.inf).logsumexp(dim=1)
    return (negatives - positives).mean()


def check_temperature(temperature: float) -> None:
    """Raise unless a temperature is above 0."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}.")


def check_views(out0: Tensor, out1: Tensor) -> None:
    """Raise unless two views are matrices of one shape."""
    if out0.dim() != 2 or out0.shape != out1.shape:
        raise ValueError(
            "out0 and out1 must be matrices of the same shape, (samples, features), got "
            f"{tuple(out0.shape)} and {tuple(out1.shape)}."
        )
