"""Restarts and refactorizations as callbacks of the Lightning Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ema_nesterov.low_rank.momentum_reset import (
    MomentumResetHandle,
    attach_momentum_reset,
    check_reset,
)
from lightning_ema_nesterov.low_rank.refactorization import (
    WeightRefactorizationHandle,
    attach_weight_refactorization,
    layers_of,
)
from lightning_ema_nesterov.low_rank.step_counter import check_count

__all__ = ["MomentumReset", "WeightRefactorization"]

Handle = MomentumResetHandle | WeightRefactorizationHandle


class _Attached(Callback, ABC):
    """Attaches something to the optimizers when fit starts, and takes it off again."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []

    @abstractmethod
    def attach_to(self, trainer: Trainer, pl_module: LightningModule) -> Sequence[Handle]:
        """Attach to the optimizers of a Trainer."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, before a checkpoint is loaded."""
        try:
            self._handles.extend(self.attach_to(trainer, pl_module))
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on from the steps of a checkpoint that was made without this callback."""
        # In manual optimization the Trainer counts the steps of all optimizers together.
        if pl_module.automatic_optimization:
            for handle in self._handles:
                handle.start_at(trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again."""
        self._detach()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take everything off again."""
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().detach()


class MomentumReset(_Attached):
    """Restart the moments and step counts of all optimizers every so often.

    The learning rate is then small, and comes back within a few steps. The direction of
    EMA-Nesterov stays. :func:`~lightning_ema_nesterov.low_rank.attach_momentum_reset` says what is
    done when; it does the same in a loop of your own.

    Args:
        every_n_steps: Steps between two restarts, at least 1.
        recovery_steps: Steps of the rate's way back, from 0 to ``every_n_steps``.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When fit starts, for an optimizer that cannot be restarted.

    Example:
        >>> MomentumReset(every_n_steps=200, recovery_steps=10).every_n_steps
        200
    """

    def __init__(self, every_n_steps: int = 200, recovery_steps: int = 10) -> None:
        super().__init__()
        check_reset(every_n_steps, recovery_steps)
        self.every_n_steps = every_n_steps
        self.recovery_steps = recovery_steps

    @override
    def attach_to(self, trainer: Trainer, pl_module: LightningModule) -> Sequence[Handle]:
        return [
            attach_momentum_reset(
                optimizer, every_n_steps=self.every_n_steps, recovery_steps=self.recovery_steps
            )
            for optimizer in trainer.optimizers
        ]


class WeightRefactorization(_Attached):
    """Balance the factors of all low-rank layers every so often; their products stay.

    What EMA-Nesterov keeps for the factors follows them.
    :func:`~lightning_ema_nesterov.low_rank.attach_weight_refactorization` says what is done when;
    it does the same in a loop of your own. The optimizer's moments stay in the coordinates of the
    former factors: put :class:`MomentumReset` with the same interval beside it, as the authors do,
    in any order.

    Args:
        every_n_steps: Steps between two refactorizations, at least 1.

    Raises:
        ValueError: If the argument is out of its range.
        MisconfigurationException: When fit starts, for a model without low-rank layers, for factors
            of one layer in two optimizers, and where processes hold parts of factors.

    Example:
        >>> WeightRefactorization(every_n_steps=200).every_n_steps
        200
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        super().__init__()
        check_count("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps

    @override
    def attach_to(self, trainer: Trainer, pl_module: LightningModule) -> Sequence[Handle]:
        with_layers = [o for o in trainer.optimizers if layers_of(pl_module, o)]
        return [
            attach_weight_refactorization(optimizer, pl_module, every_n_steps=self.every_n_steps)
            for optimizer in with_layers or trainer.optimizers[:1]
        ]
