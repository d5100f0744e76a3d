r"""EMA directions in bfloat16 or int8.

The fold needs float32. Here a copy of the lookahead point is kept while the base optimizer steps:

.. math:: m_{t+1} = (\gamma + (1 - \gamma)\beta_t)\, m_t + (1 - \gamma)(x_{t+1} - y_t)

For parameters below float32 it is a copy of the iterate, and the formula that of
:math:`\beta_t = 0`: their lookahead point is rounded.
It is done in blocks that fit in a cache, so that no float32 direction exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.equations import fold_decay
from lightning_ema_nesterov.core.metrics import StepMetrics, row_of_step
from lightning_ema_nesterov.core.narrow import is_narrow
from lightning_ema_nesterov.core.rule import Fold, LookaheadRule, largest_step_size
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.rules.codecs import Codec, Int8, codec_for, read_any
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY, STEP_SIZE_KEY

__all__ = ["CompressedDirections"]

_BLOCK_ELEMENTS = {"cpu": 2**17}
_BLOCK_ELEMENTS_ON_DEVICE = 2**22
_PRIME = 40_503


class CompressedDirections(LookaheadRule):
    r"""EMA directions in ``base_optimizer.state[p]``, stored by a codec.

    Rounding is stochastic, with noise that follows from the step and the parameter alone: a run
    that is continued from a checkpoint draws the same.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        direction_dtype: ``"bfloat16"`` or ``"int8"``.
    """

    keys = (DIRECTION_KEY, SCALES_KEY)
    step_size_key = STEP_SIZE_KEY

    def __init__(self, base_optimizer: Optimizer, ema_decay: float, direction_dtype: str) -> None:
        super().__init__(base_optimizer)
        self.ema_decay = ema_decay
        self.direction_dtype = direction_dtype
        self._noise: tuple[int, Tensor] | None = None  # of one step

    @property
    @override
    def average_decay(self) -> float:
        # With d = x - a, both sides of a = x - gamma / (1 - gamma) m obey d' = gamma (d + x' - x).
        return self.ema_decay

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        made = self.codec(p).make(p)
        return dict(zip(self.keys, made, strict=False))  # scales are in int8 only

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        has = self.store.has
        buffers = [
            self.iterate_of(p, step_size) if is_narrow(p) and has(p) else p.detach().clone()
            for p in params
        ]
        is_kept = [is_measured and has(p) for p in params]
        kept = [
            self.read_direction(p).clone() if keep else None
            for p, keep in zip(params, is_kept, strict=True)
        ]
        return Fold(params, step_size, buffers, kept)

    @override
    @torch.no_grad()
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        places = self._places()
        for p, y in zip(fold.params, fold.buffers, strict=True):
            codec = self.codec(p)
            decay = fold_decay(self.ema_decay, _distance_in_fold(p, fold))
            if not self.store.has(p):
                self.store.put(p, self.make_state(p))
            blocks = _blocks(codec, [p.detach(), y, *self.store.tensors([p])])
            for block_idx, (x_next, y_block, *stored) in enumerate(blocks):
                m = codec.read(stored).to(torch.promote_types(y.dtype, torch.float32)) * decay
                m.add_(x_next.to(m.dtype) - y_block.to(m.dtype), alpha=1.0 - self.ema_decay)
                noise = self._noise_like(m, step_idx, places[p] + block_idx * _PRIME)
                codec.write_(stored, m, noise)

    @override
    def after_step(self, step_idx: int) -> None:
        self._noise = None

    @override
    @torch.no_grad()
    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics:
        """Measure a finished step; the only communication, where parameters are sharded."""
        params = [p for fold in folds for p in fold.params]
        rows: list[Tensor] = []
        for fold in folds:
            for p, y, m in zip(fold.params, fold.buffers, fold.kept, strict=True):
                [x_next, y] = local([p.detach(), y])
                after = self.read_direction(p)
                before = torch.zeros_like(after) if m is None else m
                moved = (x_next - y).to(after.dtype).add_(before, alpha=_distance_in_fold(p, fold))
                rows.append(row_of_step(before, after, moved))
        sums = torch.stack(rows) if rows else torch.zeros(0, 4)
        sums = sharding.sum_over_shards(params, sums)
        return StepMetrics.from_sums(sums, largest_step_size(folds))

    def codec(self, p: Tensor) -> Codec:
        """Return the format of one parameter's direction."""
        return codec_for(p, self.direction_dtype)

    @override
    def read_direction(self, p: Tensor) -> Tensor:
        """Return the part of a parameter's direction that this process holds, in float32."""
        return self.codec(p).read(local(self.store.tensors([p])))

    @override
    @torch.no_grad()
    def transform(self, p: Tensor, linear_map: Callable[[Tensor], Tensor]) -> None:
        codec, stored = self.codec(p), self.store.tensors([p])
        if stored:
            m = codec.read(stored)
            codec.write_(stored, linear_map(m.double()).to(m.dtype), noise=None)

    @override
    @torch.no_grad()
    def restore(self, p: Tensor, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        codec = self.codec(p)
        tensors = [loaded[key].to(p.device) for key in self.keys if key in loaded]
        if len(tensors) == len(codec.dtypes):
            stored = [t.to(dtype) for t, dtype in zip(tensors, codec.dtypes, strict=True)]
        else:
            stored = codec.make(p)
            codec.write_(local(stored), local([read_any(p, tensors)])[0], noise=None)
        return dict(zip(self.keys, stored, strict=False))

    @override
    def check_checkpoint(self, has: Callable[[str], bool]) -> None:
        needs = any(isinstance(self.codec(p), Int8) for p in self.store.all_params())
        if has(DIRECTION_KEY) and has(SCALES_KEY) is not needs:
            made = "another direction_dtype" if needs else "direction_dtype='int8'"
            raise ValueError(
                f"direction_dtype must be that of the sharded checkpoint, got "
                f"{self.direction_dtype!r}: it was made with {made}."
            )

    @override
    @torch.no_grad()
    def add_directions(
        self, params: Sequence[Tensor], points: Sequence[Tensor], factor: float
    ) -> None:
        for p, point in zip(params, points, strict=True):
            for x, m in self.pieces(p, point.detach()):
                x.add_(m, alpha=factor)

    @override
    def pieces(self, p: Tensor, point: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        codec = self.codec(p)
        for x, *stored in _blocks(codec, [point, *self.store.tensors([p])]):
            yield x, codec.read(stored)

    def _places(self) -> dict[Tensor, int]:
        return {p: idx * _PRIME**2 for idx, p in enumerate(self.store.all_params())}

    def _noise_like(self, m: Tensor, step_idx: int, place: int) -> Tensor:
        # One table for a step, read at a place of its own by each block: elements of different
        # blocks may share a number, which leaves the rounding of each unbiased.
        size = max(2 * _block_elements(m), 2 * m.numel())
        drawn_at, table = self._noise or (-1, m)
        if drawn_at != step_idx or table.device != m.device or table.numel() < size:
            generator = torch.Generator(m.device).manual_seed(step_idx)
            table = torch.rand(size, generator=generator, device=m.device)
            self._noise = step_idx, table
        start = place % (table.numel() - m.numel() + 1)
        return table[start : start + m.numel()].view(m.shape)


def _distance_in_fold(p: Tensor, fold: Fold) -> float:
    """Return how many directions the copy in a fold is ahead of its iterate."""
    return 0.0 if is_narrow(p) else fold.step_size


def _block_elements(tensor: Tensor) -> int:
    return _BLOCK_ELEMENTS.get(tensor.device.type, _BLOCK_ELEMENTS_ON_DEVICE)


def _blocks(codec: Codec, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors alike, as views; the first has the parameter's shape."""
    own = local(tensors)
    if not all(tensor.is_contiguous() for tensor in own):
        return iter([tuple(own)])
    num_elements = _block_elements(own[0])
    if isinstance(codec, Int8):
        num_rows = max(1, num_elements // max(1, own[0].shape[-1]))
        rows = [torch.split(tensor.view(-1, tensor.shape[-1]), num_rows) for tensor in own]
        return zip(*rows, strict=True)
    return zip(*(torch.split(tensor.view(-1), num_elements) for tensor in own), strict=True)
