"""Trainer hooks that keep the parameters at the iterate whenever anyone else can look."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.claims import check_params_are_free
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.module_hooks import ModuleHooks
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.trainer.checkpoints import (
    keys_of_distributed_checkpoint,
    replace_as_a_whole,
)
from lightning_ema_nesterov.trainer.import_style import lightning_classes
from lightning_ema_nesterov.trainer.questions import (
    callbacks_of,
    check_trainer,
    is_watched_in_window,
    max_lrs_of_schedulers,
    replace_method,
    steps_per_global_step,
    window_continues,
)

__all__ = ["LookaheadCallback", "as_misconfiguration"]


class LookaheadCallback(Callback, ABC):
    """Train with a lookahead method; what the method is, a subclass says.

    Parameters hold the lookahead point from just before ``training_step`` to the optimizer's step,
    and the iterate whenever anyone else can look: validation, every checkpoint, other callbacks,
    after an exception, after fit. What the method keeps is in the optimizer's own state, so every
    checkpoint of the Trainer contains it.
    """

    def __init__(self) -> None:
        self._lookaheads: list[Lookahead] = []
        self._is_watched_in_window = False
        self._detach = ExitStack()

    @property
    def lookaheads(self) -> tuple[Lookahead, ...]:
        """One for each optimizer; empty outside of fit."""
        return tuple(self._lookaheads)

    @abstractmethod
    def make_rule(self, trainer: Trainer, optimizer: Optimizer) -> LookaheadRule:
        """Return what is kept for the parameters of one optimizer, when fit starts.

        Raises:
            ValueError: If it cannot be kept.
        """

    @abstractmethod
    def make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        """Return the step sizes of the run, when training starts.

        Raises:
            ValueError: If they do not fit the run.
        """

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
        tuning = lightning_classes(
            trainer, "callbacks.LearningRateFinder", "callbacks.BatchSizeFinder"
        )
        tuners = [c for c in callbacks_of(trainer) if isinstance(c, tuning)]
        others = [c for c in callbacks_of(trainer) if c is not self and c not in tuners]
        callbacks_of(trainer)[:] = [*tuners, self, *others]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the configuration, attach to the optimizers, and bracket the training step."""
        check_trainer(trainer, type(self).__name__)
        names = [
            type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, LookaheadCallback)
        ]
        if len(names) > 1:
            raise MisconfigurationException(
                f"One lookahead callback must be in the list, got {len(names)}: {', '.join(names)}."
            )
        # Until training starts: how many steps there are takes the data loader, which the module
        # may make in hooks that come after this one.
        asleep = LookaheadSchedule(0.0, warmup=sys.maxsize)
        self._detach.callback(self._lookaheads.clear)
        for optimizer in trainer.optimizers:
            check_params_are_free(optimizer)
            with as_misconfiguration():
                rule = self.make_rule(trainer, optimizer)
            lookahead = Lookahead(rule, asleep, module=trainer.strategy.model)
            self._detach.callback(lookahead.detach)
            with as_misconfiguration():
                self._lookaheads.append(lookahead.attach())
            owners = [m for m in (trainer.strategy.model, pl_module) if m is not None]
            for handle in ModuleHooks(lookahead).register((), owners):
                self._detach.callback(handle.remove)
        self._bracket_training_step(trainer)
        self.bracket_save_checkpoint(trainer)
        self._bracket_load_checkpoint(trainer)
        # A sharded checkpoint that is written over another would mix the directions and weights of
        # two steps where a process dies in between, and would load without an error.
        self._detach.callback(replace_as_a_whole(trainer.strategy))
        self._is_watched_in_window = is_watched_in_window(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the schedule; continue a checkpoint made without the callback at its step."""
        with as_misconfiguration():
            schedule = self.make_schedule(trainer)
        for lookahead in self._lookaheads:
            lookahead.schedule = schedule
            lookahead.attach()
        # Else an optimizer that is new has not stepped yet.
        is_first = all(lookahead.progress.is_new for lookahead in self._lookaheads)
        for lookahead in self._lookaheads:
            # Now that a checkpoint is loaded, which may be one without the callback.
            max_lrs = max_lrs_of_schedulers(trainer, lookahead.base_optimizer)
            for idx, max_lr in enumerate(max_lrs):
                lookahead.progress.set_max_lr(idx, max_lr)
            self._take_up(trainer, lookahead, is_first=is_first)
            if pl_module.automatic_optimization:
                self._keep_count_on_load(trainer, lookahead)

    def _keep_count_on_load(self, trainer: Trainer, lookahead: Lookahead) -> None:
        def keep_count(optimizer: Optimizer) -> None:
            # A callback that returns to earlier weights leaves the Trainer's count as it is.
            lookahead.progress.step_idx = trainer.global_step

        handle = lookahead.base_optimizer.register_load_state_dict_post_hook(keep_count)
        self._detach.callback(handle.remove)

    def _take_up(self, trainer: Trainer, lookahead: Lookahead, *, is_first: bool) -> None:
        num_steps = trainer.global_step // steps_per_global_step(trainer)
        is_automatic = trainer.lightning_module.automatic_optimization
        if not lookahead.progress.is_new and is_automatic and lookahead.step_idx < num_steps:
            # A run without the callback keeps what it finds in the optimizer's state, and saves it.
            for p in lookahead.rule.store.known_params():
                lookahead.rule.store.drop(p)
        elif not (num_steps and is_first):
            return
        lookahead.progress.step_idx = num_steps
        rank_zero_info(
            f"The checkpoint was made without {type(self).__name__}: training goes on from "
            f"step {num_steps} with nothing to look ahead along yet."
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
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Return to the iterate where the step was skipped or someone looks."""
        for lookahead in self._lookaheads:
            if not window_continues(trainer):
                lookahead.skip()
            elif self._is_watched_in_window:
                lookahead.pause()

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

    def _bracket_training_step(self, trainer: Trainer) -> None:
        training_step = trainer.strategy.training_step

        def extrapolate_then_training_step(*args: Any, **kwargs: Any) -> Any:
            # StochasticWeightAveraging runs an epoch without steps to update BatchNorm.
            if not trainer.fit_loop._skip_backward:
                # The last one to pause is the first to resume: optimizers may share a parameter.
                for lookahead in reversed(self._lookaheads):
                    lookahead.extrapolate()
            return training_step(*args, **kwargs)

        undo = replace_method(trainer.strategy, "training_step", extrapolate_then_training_step)
        self._detach.callback(undo)

    def bracket_save_checkpoint(self, trainer: Trainer) -> None:
        """Have every checkpoint of the Trainer be of the iterate, until :meth:`teardown`."""
        save_checkpoint = trainer.save_checkpoint

        def save_checkpoint_at_iterate(*args: Any, **kwargs: Any) -> None:
            with self.at_iterate():
                save_checkpoint(*args, **kwargs)

        undo = replace_method(trainer, "save_checkpoint", save_checkpoint_at_iterate)
        self._detach.callback(undo)

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate inside a ``with`` block."""
        with ExitStack() as stack:
            for lookahead in self._lookaheads:
                stack.enter_context(lookahead.at_iterate())
            yield

    def _bracket_load_checkpoint(self, trainer: Trainer) -> None:
        load_checkpoint = trainer.strategy.load_checkpoint

        def forget_then_load_checkpoint(path: Any, *args: Any, **kwargs: Any) -> Any:
            # A distributed checkpoint is read into the state that the optimizer has, and lacks what
            # was not saved: on_train_start attaches again.
            names = keys_of_distributed_checkpoint(path)
            if names is not None:
                for lookahead in self._lookaheads:
                    _prepare_to_load(lookahead, names)
            return load_checkpoint(path, *args, **kwargs)

        undo = replace_method(trainer.strategy, "load_checkpoint", forget_then_load_checkpoint)
        self._detach.callback(undo)


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Raise what is wrong with an argument as an error of the Trainer's configuration."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def _prepare_to_load(lookahead: Lookahead, names: list[str]) -> None:
    def has(key: str) -> bool:
        return any(name.endswith(key) for name in names)

    if has(lookahead.rule.keys[0]):
        with as_misconfiguration():
            lookahead.rule.check_checkpoint(has)
    else:
        lookahead.detach(leaves_progress=False)
