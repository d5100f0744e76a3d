"""Find out before the first run whether all runs of a study can be trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.checks import check_step_size
from lightning_ema_nesterov.experiments.advice import without_advice
from lightning_ema_nesterov.experiments.study.classes import check_arguments, find_class
from lightning_ema_nesterov.experiments.study.spec import BaseOptimizer, MethodSpec, Run, Study
from lightning_ema_nesterov.optimizers.from_config import import_optimizer
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay
from lightning_ema_nesterov.optimizers.roles import ROLES

__all__ = ["check_study"]

_MAX_SEED = 2**32 - 1


def check_study(study: Study) -> None:
    """Raise if a run of a study cannot be trained.

    Raises:
        ValueError: If a value is out of its range, a name is not known, the machine lacks the
            accelerator, or a method does not fit the run; the message names the key.
    """
    _check_values(study)
    for key, base in _with_keys(study.base_optimizers, "base_optimizers"):
        _check_base(base, key)
    for name, method in study.methods.items():
        _check_method(method, f"methods.{name}", study.num_steps)
    _check_names(study.base_optimizers, [m.bases for m in study.methods.values()], "bases")
    instead = [list(base.instead) for base in study.base_optimizers.values()]
    _check_names(study.methods, instead, "instead")
    specs = [("model", study.model), ("data", study.data)]
    bases = [base for _, base in _with_keys(study.base_optimizers, "")]
    callbacks = [*study.callbacks, *(spec for base in bases for spec in base.callbacks)]
    for key, spec in [*specs, *(("callbacks", spec) for spec in callbacks)]:
        check_arguments(find_class(spec.class_path, key), spec.init_args, key)
    for run in study.runs():
        _check_schedule(study, run)
    _check_accelerator(study.accelerator, study.precision)


def _check_schedule(study: Study, run: Run) -> None:
    warmup, decay = study.lr_warmup, study.lr_decay_of(run)
    try:
        WarmupStableDecay.of_fractions(study.num_steps, warmup=warmup, decay=decay)
    except ValueError as error:
        raise ValueError(
            f"lr_warmup and lr_decay must fit into the run, got {warmup:g} and {decay:g} for "
            f"{run.method} on {run.base}: {error}"
        ) from error


def _check_values(study: Study) -> None:
    if study.num_validations < 1 or study.num_steps % study.num_validations or study.num_steps < 1:
        raise ValueError(
            "num_steps must be a positive multiple of num_validations, got "
            f"{study.num_steps} and {study.num_validations}."
        )
    shares = [("average_shares", share) for share in study.average_shares]
    for name, value in [("lr_warmup", study.lr_warmup), ("lr_decay", study.lr_decay), *shares]:
        _check_fraction(value, name)
    _check_seeds(study)
    if study.gradient_clip_val is not None and not study.gradient_clip_val > 0:
        raise ValueError(
            "gradient_clip_val must be above 0, or null for no clipping, got "
            f"{study.gradient_clip_val}."
        )
    if not 0 <= study.confirming_margin < math.inf:
        raise ValueError(f"confirming_margin must be at least 0, got {study.confirming_margin}.")
    for name in ("num_threads", "accumulate_grad_batches"):
        if getattr(study, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(study, name)}.")


def _check_seeds(study: Study) -> None:
    seeds = [*study.seeds, *study.confirming_seeds]
    if not study.seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "seeds must be different numbers, at least one, and confirming_seeds others, got "
            f"{study.seeds} and {study.confirming_seeds}."
        )
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seeds must be in [0, {_MAX_SEED}], got {seed}.")


def _check_fraction(value: float, key: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key} must be in [0, 1], got {value}.")


def _with_keys(bases: Mapping[str, BaseOptimizer], key: str) -> Iterator[tuple[str, BaseOptimizer]]:
    for name, base in bases.items():
        yield f"{key}.{name}", base
        yield from _with_keys(base.instead, f"{key}.{name}.instead")


def _check_base(base: BaseOptimizer, key: str) -> None:
    if not base.lrs or not all(0 < lr < math.inf for lr in base.lrs):
        raise ValueError(f"{key}.lrs must be learning rates above 0, got {base.lrs}.")
    if base.lr_decay is not None:
        _check_fraction(base.lr_decay, f"{key}.lr_decay")
    try:
        factory = import_optimizer(base.class_path, key)
    except TypeError as error:
        raise ValueError(str(error)) from error
    check_arguments(factory, base.init_args, key, num_before=1)


def _check_method(method: MethodSpec, key: str, num_steps: int) -> None:
    if method.lr_decay is not None:
        _check_fraction(method.lr_decay, f"{key}.lr_decay")
    if not all(0 < lr < math.inf for lr in method.lrs):
        raise ValueError(f"{key}.lrs must be learning rates above 0, got {method.lrs}.")
    if method.class_path is None:
        return
    found: Callable[..., object] = find_class(method.class_path, key)
    check_arguments(found, method.init_args, key)
    try:
        callback = found(**method.init_args)  # says what is out of its range
        if method.lookahead_step_size_by_role:
            _check_roles(method, callback)
        if isinstance(callback, EMANesterov):
            callback.settings.schedule(callback.settings.total_steps or num_steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def _check_roles(method: MethodSpec, callback: object) -> None:
    if not isinstance(callback, EMANesterov):
        raise ValueError(
            f"lookahead_step_size_by_role must go with EMANesterov, got {type(callback).__name__}."
        )
    for role, step_size in method.lookahead_step_size_by_role.items():
        if role not in ROLES:
            raise ValueError(
                f"lookahead_step_size_by_role must have roles, {ROLES}, as its keys, got {role!r}."
            )
        check_step_size(f"lookahead_step_size_by_role.{role}", step_size)


def _check_names(known: Mapping[str, object], used: Sequence[Sequence[str]], key: str) -> None:
    for name in itertools.chain.from_iterable(used):
        if name not in known:
            raise ValueError(f"{key}: {name!r} is not known; known are {', '.join(known)}.")


def _check_accelerator(accelerator: str, precision: str) -> None:
    try:
        with without_advice():
            Trainer(
                accelerator=accelerator,
                precision=precision,  # type: ignore[arg-type]  # the Trainer checks it
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (ImportError, MisconfigurationException, ValueError) as error:
        raise ValueError(
            "accelerator and precision must be what this machine has, got "
            f"{accelerator!r} and {precision!r}: {error}"
        ) from error
