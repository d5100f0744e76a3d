"""EMA-Nesterov as a callback of the Lightning Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.averages.evaluation import Evaluation
from lightning_ema_nesterov.core.metrics import tag_suffixes
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.make import DEFAULTS, Settings
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback, as_misconfiguration
from lightning_ema_nesterov.trainer.questions import (
    estimate_total_steps,
    is_of_tuner,
    is_trial,
    is_watched_between_steps,
)

__all__ = ["EMANesterov"]


class EMANesterov(LookaheadCallback):
    r"""Train with EMA-Nesterov: gradients at a lookahead point, along an average of past updates.

    .. math::

        y_t     &= x_t + \beta_t\, m_t                        && \text{before the forward pass} \\
        x_{t+1} &= A_t(y_t)                                   && \text{the module's optimizer} \\
        m_{t+1} &= \gamma\, m_t + (1 - \gamma)(x_{t+1} - x_t) && \text{after its step}

    Parameters hold the lookahead point :math:`y_t` from just before ``training_step`` to the
    optimizer's step, and the iterate :math:`x_t` whenever anyone else can look: validation, every
    checkpoint, other callbacks, after an exception, after fit. In ``training_step`` too
    ``state_dict()`` of the module gives the iterate, as copies; loading weights ends the lookahead
    of the step, and ``copy.deepcopy`` of the module is refused.

    The direction :math:`m_t` is in the optimizer's own state, so every checkpoint of the Trainer
    contains it. A checkpoint made without the callback can be continued with it (:math:`m` starts
    at 0), and the other way round.

    In manual optimization the lookahead point is taken at the start of ``training_step``: a second
    step of the same optimizer in one ``training_step`` has :math:`\beta_t = 0`, unless
    :meth:`extrapolate` is called before its forward pass.

    Args:
        lookahead_step_size: Peak step size :math:`\beta`, in (-1, 1). A steady base displacement
            ``u`` becomes ``u / (1 - lookahead_step_size)``: compare at retuned learning rates. A
            parameter group with the key ``"lookahead_step_size"`` has that instead; at 0 it does
            not look ahead, and its direction is kept for the average.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1). The direction remembers about
            ``1 / (1 - ema_decay)`` optimizer steps; 0 is Nesterov's one-step lookahead.
        warmup: First steps without lookahead, while the direction fills. ``int``: optimizer steps,
            at least 0. ``float``: fraction of the run's optimizer steps, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum, for each
            parameter group. The maximum is ``group["max_lr"]`` where there is one, ``max_lr`` of
            CyclicLR, else the larger of ``initial_lr`` and ``lr`` at the start; at least the
            largest learning rate seen.
        evaluate_at: Where validation, test and prediction run: at the ``"iterate"``, or at the
            ``"average"``, the exponential average of the iterates with decay :math:`\gamma`.
            Checkpoints hold the iterate all the same.
        average_share: Share of the way from the iterate to the average, in [0, 1].
        total_steps: Optimizer steps of the run, at least 1. ``None``: the Trainer's estimate.
            Give it in manual optimization when an optimizer does not step once per batch.
        compile: Whether ``torch.compile`` joins passes over memory into one. In ``training_step``
            and up to the optimizer's step ``optimizer.state`` then holds the fold of the direction;
            ``optimizer.state_dict()`` and every checkpoint hold the direction.
        direction_dtype: How directions are stored: ``"float32"``, ``"bfloat16"``, or ``"int8"``
            for matrices, the last two with stochastic rounding. They save persistent memory; while
            the optimizer steps, a copy of the parameters is kept.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: When fit starts: for DeepSpeed and XLA, without an optimizer,
            for a second EMANesterov, where ``warmup`` and ``rest`` do not fit the run, and for
            FSDP (1) with another ``direction_dtype`` than float32.
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
        lookahead_step_size: float = DEFAULTS.lookahead_step_size,
        ema_decay: float = DEFAULTS.ema_decay,
        *,
        warmup: int | float = DEFAULTS.warmup,
        rest: int | float = DEFAULTS.rest,
        scale_with_lr: bool = DEFAULTS.scale_with_lr,
        evaluate_at: Literal["iterate", "average"] = "iterate",
        average_share: float = DEFAULTS.average_share,
        total_steps: int | None = DEFAULTS.total_steps,
        compile: bool = DEFAULTS.compile,
        direction_dtype: str = DEFAULTS.direction_dtype,
    ) -> None:
        super().__init__()
        self.settings = Settings(
            lookahead_step_size,
            ema_decay,
            warmup=warmup,
            rest=rest,
            scale_with_lr=scale_with_lr,
            evaluate_at=evaluate_at,
            average_share=average_share,
            total_steps=total_steps,
            compile=compile,
            direction_dtype=direction_dtype,
        )
        is_average = self.settings.evaluate_at == "average"
        self._evaluation = Evaluation(average_share) if is_average else None

    def __repr__(self) -> str:
        return repr(self.settings).replace(type(self.settings).__name__, type(self).__name__, 1)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go first in the list; forget what was evaluated or trained before."""
        super().setup(trainer, pl_module, stage)
        if self._evaluation is not None:
            self._evaluation.forget(also_trained=stage == "fit")
            if stage != "fit":
                self.bracket_save_checkpoint(trainer)

    @override
    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate inside a ``with`` block, also in an evaluation."""
        with ExitStack() as stack:
            if self._evaluation is not None:
                stack.enter_context(self._evaluation.at_iterate())
            stack.enter_context(super().at_iterate())
            yield

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
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        names = [type(lookahead.base_optimizer).__name__ for lookahead in self._lookaheads]
        for lookahead, suffix in zip(self._lookaheads, tag_suffixes(names), strict=True):
            if lookahead.metrics is not None:
                scalars = lookahead.metrics.as_scalars(suffix)
                # With a batch size Lightning does not look for one in the batch, which can be None.
                self.log_dict(scalars, batch_size=1)  # type: ignore[attr-defined]  # it sets it
                lookahead.metrics = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to where the model is evaluated, until validation ends."""
        super().on_validation_start(trainer, pl_module)
        self._enter_average(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate, before any other callback saves or reads it."""
        self._leave_average()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to where the model is evaluated, until the test ends."""
        self._enter_average(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate."""
        self._leave_average()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to where the model predicts, until prediction ends."""
        self._enter_average(trainer)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate."""
        self._leave_average()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Return to the iterate before anyone saves a checkpoint, and take everything off."""
        self._leave_average()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the average of a checkpoint that is evaluated."""
        if self._evaluation is None or trainer.state.fn == TrainerFn.FITTING:
            return
        path = Path(trainer.ckpt_path or "")
        if trainer.ckpt_path and not is_of_tuner(path):
            with as_misconfiguration():
                self._evaluation.take_checkpoint(path, checkpoint)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again."""
        if self._evaluation is not None:
            self._evaluation.forget(also_trained=False)
        super().teardown(trainer, pl_module, stage)

    def _enter_average(self, trainer: Trainer) -> None:
        if self._evaluation is None:
            return
        with as_misconfiguration():
            is_there = self._evaluation.enter(trainer.lightning_module, self._lookaheads)
        if not is_there:
            rank_zero_warn(
                "EMANesterov has no average of these weights to evaluate at, and they are taken as "
                "they are: evaluate after fit, before anyone changes the weights that were "
                "trained, or give ckpt_path of a checkpoint that was made with it."
            )

    def _leave_average(self) -> None:
        if self._evaluation is not None:
            self._evaluation.leave(self._lookaheads)

    @override
    def make_rule(self, trainer: Trainer, optimizer: Optimizer) -> LookaheadRule:
        ends_late = not is_watched_between_steps(trainer, self)
        return self.settings.rule(optimizer, trainer.strategy.model, ends_late=ends_late)

    @override
    def make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        total_steps = self.settings.total_steps or estimate_total_steps(trainer)
        try:
            schedule = self.settings.schedule(total_steps)
        except ValueError:
            if not is_trial(trainer, total_steps):
                raise
            rank_zero_info("EMANesterov leaves warmup and rest out: they do not fit so few steps.")
            return replace(self.settings, warmup=0, rest=0).schedule(None)
        is_average = self.settings.evaluate_at == "average"
        if any(lookahead.scope.is_ever_ahead(schedule) for lookahead in self._lookaheads):
            rank_zero_info(f"EMANesterov looks ahead in {_describe(schedule)}.")
        elif self.settings.lookahead_step_size or not is_average:
            rank_zero_warn(
                "EMANesterov never looks ahead in this run, so training equals the base optimizer "
                f"alone: {self!r} in {total_steps} steps."
            )
        return schedule

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the iterate for good; warn of a run that ended before it looked ahead."""
        super().on_train_end(trainer, pl_module)
        if self._evaluation is not None:
            self._evaluation.take_trained(self._lookaheads)
        for lookahead in self._lookaheads[:1]:
            schedule, num_steps = lookahead.schedule, lookahead.step_idx
            is_ahead = lookahead.scope.is_ever_ahead(schedule)
            if is_ahead and num_steps <= schedule.warmup_steps:
                rank_zero_warn(
                    f"EMANesterov did not look ahead: the run ended after {num_steps} optimizer "
                    f"steps, and its warmup has {schedule.warmup_steps}. Where a run can stop "
                    "early, give warmup and rest in optimizer steps (ints), or total_steps."
                )


def _describe(schedule: LookaheadSchedule) -> str:
    if schedule.total_steps is None:
        return f"all optimizer steps from {schedule.warmup_steps:,} on"
    last = schedule.total_steps - schedule.rest_steps - 1
    return f"optimizer steps {schedule.warmup_steps:,} to {last:,} of {schedule.total_steps:,}"
