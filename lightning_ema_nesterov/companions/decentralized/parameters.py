"""An optimizer's parameters as one vector, which is what agents exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["FlatParameters"]


class FlatParameters:
    """Read and write an optimizer's parameters as one vector.

    The vector is float32, or the parameters' dtype where that is wider.

    Args:
        optimizer: Its trainable parameters, in the order of its groups, make the vector.

    Raises:
        ValueError: If the optimizer has no trainable parameter.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
        >>> parameters = FlatParameters(torch.optim.SGD([p], lr=0.1))
        >>> parameters.write(parameters.read() + 1)
        >>> p
        Parameter containing:
        tensor([[2., 3.]], requires_grad=True)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._params = self._trainable()
        if not self._params:
            raise ValueError(
                f"{type(optimizer).__name__} must have a trainable parameter, got none."
            )
        self.dtype = torch.float32
        for p in self._params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters themselves.

        Raises:
            RuntimeError: If the optimizer's trainable parameters are not those of the start.
        """
        now = self._trainable()
        if len(now) != len(self._params) or any(
            p is not q for p, q in zip(now, self._params, strict=True)
        ):
            raise RuntimeError(
                f"The optimizer's {len(self._params)} trainable parameters must stay the same in a "
                f"run, got {len(now)}: neighbours could not tell which number is which. Freeze, "
                "unfreeze and add parameters before fit."
            )
        return self._params

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return a copy, of shape ``(size,)``."""
        return self._flatten(self.tensors)

    @torch.no_grad()
    def read_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients, 0 where there is none, and the same times the learning rates."""
        params = self.tensors
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        return self.scale_gradients(gradients)

    @torch.no_grad()
    def scale_gradients(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return gradients as a vector, and times each parameter's learning rate."""
        rates = [
            float(group["lr"])
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        scaled = [g.to(self.dtype) * rate for g, rate in zip(gradients, rates, strict=True)]
        return self._flatten(gradients), self._flatten(scaled)

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Overwrite the parameters."""
        for p, values in zip(self.tensors, self._split(vector), strict=True):
            p.copy_(values)

    @torch.no_grad()
    def write_gradients(self, vector: Tensor) -> None:
        """Overwrite the gradients, and make those that are missing."""
        for p, values in zip(self.tensors, self._split(vector), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(values)

    @contextmanager
    def at(self, vector: Tensor) -> Iterator[None]:
        """Have the parameters hold other values for a while, then their own again, bit for bit."""
        params = self.tensors
        own = [p.data for p in params]
        try:
            for p, values in zip(params, self._split(vector), strict=True):
                # The pointer is swapped: nothing is copied, and no graph sees a change in place.
                p.data = values.to(p.dtype)
            yield
        finally:
            for p, data in zip(params, own, strict=True):
                p.data = data

    def _trainable(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _flatten(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten().to(self.dtype) for t in tensors])

    def _split(self, vector: Tensor) -> list[Tensor]:
        pieces = torch.split(vector, [p.numel() for p in self._params])
        return [v.view(p.shape) for v, p in zip(pieces, self._params, strict=True)]
