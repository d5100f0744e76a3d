"""EMA-Nesterov as a callback of the Lightning Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.checkpoints import is_distributed_checkpoint_without, replace_as_a_whole
from lightning_ema_nesterov.direction import DIRECTION_KEY
from lightning_ema_nesterov.lookahead import Lookahead
from lightning_ema_nesterov.metrics import tag_suffixes
from lightning_ema_nesterov.schedule import (
    LookaheadSchedule,
    check_duration,
    check_total_steps,
    check_unit_interval,
)
from lightning_ema_nesterov.trainer import (
    check_trainer,
    estimate_total_steps,
    is_watched_in_window,
    replace_method,
    steps_per_global_step,
    tell_max_lr,
    window_continues,
)

__all__ = ["EMANesterov"]


class EMANesterov(Callback):
    r"""Train with EMA-Nesterov: gradients at a lookahead point, along an average of past updates.

    .. math::

        y_t     &= x_t + \beta_t\, m_t                        && \text{before the forward pass} \\
        x_{t+1} &= A_t(y_t)                                   && \text{the module's optimizer} \\
        m_{t+1} &= \gamma\, m_t + (1 - \gamma)(x_{t+1} - x_t) && \text{after its step}

    Parameters hold the lookahead point :math:`y_t` from just before ``training_step`` to the
    optimizer's step, and the iterate :math:`x_t` whenever anyone else can look: validation, every
    checkpoint, other callbacks, after an exception, after fit. The direction :math:`m_t` is in the
    optimizer's own state, so every checkpoint of the Trainer contains it. A checkpoint made without
    the callback can be continued with it (:math:`m` starts at 0), and the other way round.

    In manual optimization the lookahead point is taken at the start of ``training_step``: a second
    step of the same optimizer in one ``training_step`` has :math:`\beta_t = 0`, unless
    :meth:`extrapolate` is called before its forward pass.

    Args:
        lookahead_step_size: Peak step size :math:`\beta`, in [0, 1). A steady base displacement
            ``u`` becomes ``u / (1 - lookahead_step_size)``: compare at retuned learning rates.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1). The direction remembers about
            ``1 / (1 - ema_decay)`` optimizer steps; 0 is Nesterov's one-step lookahead.
        warmup: First steps without lookahead, while the direction fills. ``int``: optimizer steps,
            at least 0. ``float``: fraction of the run's optimizer steps, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum, for each
            parameter group. The maximum is ``group["max_lr"]`` where there is one, ``max_lr`` of
            CyclicLR, else the larger of ``initial_lr`` and ``lr`` at the start; at least the
            largest learning rate seen.
        total_steps: Optimizer steps of the run, at least 1. ``None``: the Trainer's estimate.
            Give it in manual optimization when an optimizer does not step once per batch.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When fit starts: for DeepSpeed and XLA, without an optimizer,
            for a second EMANesterov, and where ``warmup`` and ``rest`` do not fit the run.
        TypeError: When fit starts, for an optimizer that is not a ``torch.optim.Optimizer``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = EMANesterov(lookahead_step_size=0.5, ema_decay=0.99)
        >>> trainer = Trainer(max_steps=20, callbacks=[callback], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())

    References:
        Yau, Li, Glentis, Boreiko, Wai, Hong, *EMA-Nesterov*, 2026. https://arxiv.org/abs/2605.25395
    """

    def __init__(
        self,
        lookahead_step_size: float = 0.5,
        ema_decay: float = 0.99,
        *,
        warmup: int | float = 0.1,
        rest: int | float = 0.15,
        scale_with_lr: bool = True,
        total_steps: int | None = None,
    ) -> None:
        check_unit_interval("lookahead_step_size", lookahead_step_size)
        check_unit_interval("ema_decay", ema_decay)
        check_duration("warmup", warmup)
        check_duration("rest", rest)
        check_total_steps(total_steps)
        self.lookahead_step_size = lookahead_step_size
        self.ema_decay = ema_decay
        self.warmup = warmup
        self.rest = rest
        self.scale_with_lr = scale_with_lr
        self.total_steps = total_steps
        self._lookaheads: list[Lookahead] = []
        self._is_watched_in_window = False
        self._detach = ExitStack()

    def extrapolate(self, optimizer: Optimizer) -> None:
        """Move one optimizer's parameters to the lookahead point, in manual optimization.

        Only needed before the second and later forward passes of one ``training_step``.

        Args:
            optimizer: One of the module's optimizers, as ``self.optimizers()`` gives it.

        Raises:
            RuntimeError: If the optimizer is not being trained by this callback.
        """
        unwrapped = getattr(optimizer, "optimizer", None)  # LightningOptimizer wraps it
        for lookahead in self._lookaheads:
            if lookahead.base_optimizer in (optimizer, unwrapped):
                return lookahead.extrapolate()
        raise RuntimeError(
            f"extrapolate() must be called during fit with an optimizer of the module, got "
            f"{type(optimizer).__qualname__} with {len(self._lookaheads)} optimizers attached."
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go first in the list, after the tuners: every other callback then sees the iterate."""
        tuners = [
            c for c in trainer.callbacks if isinstance(c, (LearningRateFinder, BatchSizeFinder))
        ]
        others = [c for c in trainer.callbacks if c is not self and c not in tuners]
        trainer.callbacks[:] = [*tuners, self, *others]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the configuration, attach to the optimizers, and bracket the training step."""
        check_trainer(trainer)
        num_callbacks = sum(isinstance(callback, EMANesterov) for callback in trainer.callbacks)
        if num_callbacks > 1:
            raise MisconfigurationException(
                f"EMANesterov must be in the list of callbacks once, got {num_callbacks}."
            )
        schedule = self._make_schedule(trainer)
        tell_max_lr(trainer)
        for optimizer in trainer.optimizers:
            lookahead = Lookahead(
                optimizer, schedule, ema_decay=self.ema_decay, module=trainer.strategy.model
            )
            self._detach.callback(lookahead.detach)
            self._lookaheads.append(lookahead.attach())
        self._detach.callback(self._lookaheads.clear)
        self._bracket_training_step(trainer)
        self._bracket_save_checkpoint(trainer)
        self._bracket_load_checkpoint(trainer)
        self._detach.callback(replace_as_a_whole(trainer.strategy))
        self._is_watched_in_window = is_watched_in_window(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a checkpoint that was made without the callback at its step of the run."""
        for lookahead in self._lookaheads:
            lookahead.attach()
            if trainer.global_step and lookahead.is_new:
                lookahead.step_idx = trainer.global_step // steps_per_global_step(trainer)
                rank_zero_info(
                    "The checkpoint was made without EMA-Nesterov: training goes on from step "
                    f"{lookahead.step_idx} with an EMA direction of zero."
                )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again."""
        self._detach.close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Return to the iterate before anyone saves a checkpoint, and take everything off."""
        self._detach.close()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Have the step measured if its metrics will be logged."""
        is_logged = bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        for lookahead in self._lookaheads:
            if lookahead.base_optimizer is optimizer:
                lookahead.will_measure = is_logged

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Return to the iterate where the step was skipped or someone looks; log."""
        for lookahead in self._lookaheads:
            if not window_continues(trainer):
                lookahead.skip()
            elif self._is_watched_in_window:
                lookahead.pause()
        names = [type(lookahead.base_optimizer).__name__ for lookahead in self._lookaheads]
        for lookahead, suffix in zip(self._lookaheads, tag_suffixes(names), strict=True):
            if lookahead.metrics is not None:
                self.log_dict(lookahead.metrics.as_scalars(suffix))
                lookahead.metrics = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate until the next training step."""
        for lookahead in self._lookaheads:
            lookahead.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate; in manual optimization a window may span two epochs."""
        for lookahead in self._lookaheads:
            if pl_module.automatic_optimization:
                lookahead.retract()
            else:
                lookahead.pause()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate for good."""
        for lookahead in self._lookaheads:
            lookahead.retract()

    def _make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        total_steps = self.total_steps
        if total_steps is None and (self.rest or isinstance(self.warmup, float)):
            total_steps = estimate_total_steps(trainer)
        if trainer.fast_dev_run:  # a trial of the code on one batch: no schedule fits
            return LookaheadSchedule(self.lookahead_step_size, scale_with_lr=self.scale_with_lr)
        try:
            schedule = LookaheadSchedule(
                self.lookahead_step_size,
                warmup=self.warmup,
                rest=self.rest,
                total_steps=total_steps,
                scale_with_lr=self.scale_with_lr,
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if not schedule.is_ever_active:
            rank_zero_warn(
                "EMANesterov never looks ahead in this run, so training equals the base optimizer "
                f"alone: lookahead_step_size={self.lookahead_step_size}, warmup={self.warmup}, "
                f"rest={self.rest}, total_steps={total_steps}."
            )
        return schedule

    def _bracket_training_step(self, trainer: Trainer) -> None:
        training_step = trainer.strategy.training_step

        def extrapolate_then_training_step(*args: Any, **kwargs: Any) -> Any:
            # StochasticWeightAveraging runs an epoch without steps to update BatchNorm.
            if not trainer.fit_loop._skip_backward:
                for lookahead in self._lookaheads:
                    lookahead.extrapolate()
            return training_step(*args, **kwargs)

        undo = replace_method(trainer.strategy, "training_step", extrapolate_then_training_step)
        self._detach.callback(undo)

    def _bracket_save_checkpoint(self, trainer: Trainer) -> None:
        save_checkpoint = trainer.save_checkpoint

        def save_checkpoint_at_iterate(*args: Any, **kwargs: Any) -> None:
            with ExitStack() as stack:
                for lookahead in self._lookaheads:
                    stack.enter_context(lookahead.at_iterate())
                save_checkpoint(*args, **kwargs)

        undo = replace_method(trainer, "save_checkpoint", save_checkpoint_at_iterate)
        self._detach.callback(undo)

    def _bracket_load_checkpoint(self, trainer: Trainer) -> None:
        load_checkpoint = trainer.strategy.load_checkpoint

        def forget_then_load_checkpoint(path: Any, *args: Any, **kwargs: Any) -> Any:
            # A distributed checkpoint is read into the state that the optimizer has, and lacks what
            # was not saved: on_train_start attaches again.
            if is_distributed_checkpoint_without(DIRECTION_KEY, path):
                for lookahead in self._lookaheads:
                    lookahead.forget()
            return load_checkpoint(path, *args, **kwargs)

        undo = replace_method(trainer.strategy, "load_checkpoint", forget_then_load_checkpoint)
        self._detach.callback(undo)
