"""Schedule-Free optimizers in the Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ema_nesterov.trainer.questions import replace_method

__all__ = ["ScheduleFree"]


class ScheduleFree(Callback):
    """Switch Schedule-Free optimizers between training and evaluation at the right moments.

    The method is in the optimizer, for example ``schedulefree.AdamWScheduleFree``, whose ``train``
    and ``eval`` move the parameters between the point of the gradient and the average. They hold
    the average in validation, in every checkpoint, after an exception and after fit.

    Raises:
        MisconfigurationException: When fit starts, if an optimizer cannot be switched.

    References:
        Defazio et al., *The Road Less Scheduled*, 2024. https://arxiv.org/abs/2405.15682
    """

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._detach = ExitStack()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers, and bracket checkpoints."""
        for optimizer in trainer.optimizers:
            if not (hasattr(optimizer, "train") and hasattr(optimizer, "eval")):
                raise MisconfigurationException(
                    "ScheduleFree needs optimizers with train() and eval(), as in the package "
                    f"schedulefree, got {type(optimizer).__qualname__}."
                )
        self._optimizers = list(trainer.optimizers)
        save_checkpoint = trainer.save_checkpoint

        def save_checkpoint_at_average(*args: Any, **kwargs: Any) -> None:
            is_training = any(g["train_mode"] for o in self._optimizers for g in o.param_groups)
            self._switch(to_training=False)
            save_checkpoint(*args, **kwargs)
            self._switch(to_training=is_training)

        undo = replace_method(trainer, "save_checkpoint", save_checkpoint_at_average)
        self._detach.callback(undo)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go to the point of the gradient."""
        self._switch(to_training=True)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the average."""
        self._switch(to_training=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the average for good."""
        self._switch(to_training=False)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Go to the average before anyone saves a checkpoint."""
        self._switch(to_training=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bracket off again."""
        self._optimizers = []
        self._detach.close()

    def _switch(self, *, to_training: bool) -> None:
        for optimizer in self._optimizers:
            switch = optimizer.train if to_training else optimizer.eval
            switch()
