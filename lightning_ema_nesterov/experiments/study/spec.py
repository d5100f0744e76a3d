"""What a study trains."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_ema_nesterov.experiments.study.classes import find_class

__all__ = ["BASELINE", "BaseOptimizer", "ClassSpec", "MethodSpec", "Run", "Study"]

BASELINE = "none"
"""Name of the method that is none: the base optimizer alone. Every study has it."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        base: Name of the base optimizer.
        method: Name of the method.
        lr: Peak learning rate.
        seed: Seed of the weights and of the order of the data.
    """

    base: str
    method: str
    lr: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where in the study its event file is."""
        short = f"{self.lr:g}"
        lr = short if float(short) == self.lr else repr(self.lr)
        return Path(self.base, self.method, f"lr-{lr}", f"seed-{self.seed}")

    @classmethod
    def of_folder(cls, folder: Path) -> Run:
        """Return the run whose event file is in a folder.

        Example:
            >>> Run.of_folder(Path("runs/adamw/none/lr-0.002/seed-1"))
            Run(base='adamw', method='none', lr=0.002, seed=1)
        """
        base, method, lr, seed = folder.parts[-4:]
        return cls(base, method, float(lr.removeprefix("lr-")), int(seed.removeprefix("seed-")))


@dataclass(frozen=True)
class ClassSpec:
    """A class and its arguments.

    Attributes:
        class_path: Dotted path of the class.
        init_args: Its arguments.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseOptimizer:
    """A base optimizer.

    Attributes:
        class_path: Name of the optimizer, or of a function that takes ``model.parameters()``.
        lrs: Peak learning rates to try, above 0.
        init_args: Its other arguments. Where they hold learning rates, as those of ``by_role``,
            the ratios between them are kept.
        lr_decay: Fraction of the run in which the learning rate falls, in [0, 1]; ``None``: the
            study's.
        instead: Optimizers in the place of this one, by the name of the method that needs them.
        callbacks: ``class_path`` and ``init_args`` of callbacks that belong to it, before that of
            the method.
    """

    class_path: str
    lrs: list[float]
    init_args: dict[str, Any] = field(default_factory=dict)
    lr_decay: float | None = None
    instead: dict[str, BaseOptimizer] = field(default_factory=dict)
    callbacks: list[ClassSpec] = field(default_factory=list)


@dataclass(frozen=True)
class MethodSpec:
    """A method: a callback of the Trainer.

    Attributes:
        class_path: ``EMANesterov``, a name from ``lightning_ema_nesterov.peers``, or the path of a
            callback of the user's; ``None`` for the baseline.
        init_args: Its arguments.
        grid: Values of further arguments. Each combination is a method of its own.
        bases: Names of the base optimizers that it is for; empty for all.
        lrs: Peak learning rates to try, above 0; empty for those of the base optimizer.
        lookahead_step_size_by_role: For EMANesterov, other step sizes for the parameters of a role,
            as for ``litgpt.ema_nesterov``.
        lr_decay: Fraction of the run in which the learning rate falls, in [0, 1]; ``None``: that of
            the base optimizer.
    """

    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    lookahead_step_size_by_role: dict[str, float] = field(default_factory=dict)
    lr_decay: float | None = None

    @property
    def lookahead_step_size(self) -> float:
        """Peak lookahead step size, 0 for methods that have none."""
        if self.class_path is None:
            return 0.0
        parameters = inspect.signature(find_class(self.class_path, "methods")).parameters
        parameter = parameters.get("lookahead_step_size")
        default = 0.0 if parameter is None else parameter.default
        return float(self.init_args.get("lookahead_step_size", default))


@dataclass(frozen=True)
class Study:
    """A study: every method on every base optimizer, at each learning rate, over seeds.

    The baseline is also trained at ``lr / (1 - lookahead_step_size)`` for each learning rate of a
    method with a lookahead step size: a steady update becomes as large there as with the method.
    It is not where the method has another optimizer or another decay of the learning rate.

    Runs are in the order of the seeds, then of the learning rates: what comes first in the lists is
    known first, for all methods.

    Attributes:
        model: ``class_path`` and ``init_args`` of a LightningModule that logs ``val_loss``. Its
            ``configure_optimizers`` is not used.
        data: ``class_path`` and ``init_args`` of a LightningDataModule.
        num_steps: Optimizer steps of each run, a positive multiple of ``num_validations``.
        base_optimizers: Base optimizers by name.
        methods: Methods by name.
        seeds: Seeds, each for every combination, in [0, 2 ** 32).
        confirming_seeds: Seeds for the best learning rates of each method only, which ``seeds``
            choose. The report is then about the confirming seeds, which chose nothing.
        confirming_margin: Learning rates of a method whose mean final loss is at most this far
            above its best are confirmed too, at least 0. Few seeds may choose a poor rate.
        callbacks: ``class_path`` and ``init_args`` of callbacks that every run has.
        has_gained_baseline: Whether the baseline is also trained at those learning rates. Without,
            a grid of methods over many step sizes is compared with the baseline's own rates.
        num_validations: Validations of each run, evenly spaced, the last one at the end.
        lr_warmup: Fraction of the run in which the learning rate rises linearly, in [0, 1].
        lr_decay: Fraction of the run in which it falls linearly to 0, in [0, 1].
        average_shares: Shares of the way from the iterate to the average, in [0, 1], at which runs
            with EMANesterov are evaluated as well. Each is a method of its own in the report.
        accumulate_grad_batches: Batches of each optimizer step, at least 1.
        precision: As the Trainer names it: ``32-true``, ``bf16-mixed`` and others.
        has_checkpoints: Whether each run keeps a checkpoint at its last validation, from which the
            same command goes on in the middle of the run. The data must say where they are, by
            ``state_dict`` and ``load_state_dict`` of the LightningDataModule.
        gradient_clip_val: Norm to which gradients are clipped, above 0; ``None``: not at all.
        accelerator: As the Trainer names it.
        num_threads: Threads of torch in each run on a CPU, at least 1: results depend on it.
        quick: Attributes of the study that ``--quick`` replaces.
    """

    model: ClassSpec
    data: ClassSpec
    num_steps: int
    base_optimizers: dict[str, BaseOptimizer]
    methods: dict[str, MethodSpec]
    seeds: list[int]
    confirming_seeds: list[int] = field(default_factory=list)
    confirming_margin: float = 0.0
    callbacks: list[ClassSpec] = field(default_factory=list)
    has_gained_baseline: bool = True
    num_validations: int = 10
    lr_warmup: float = 0.05
    lr_decay: float = 0.3
    average_shares: list[float] = field(default_factory=list)
    accumulate_grad_batches: int = 1
    precision: str = "32-true"
    has_checkpoints: bool = False
    gradient_clip_val: float | None = 1.0
    accelerator: str = "cpu"
    num_threads: int = 1
    quick: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """Return all runs but the confirming ones, so that a part of them is a study too."""
        by_rank = {
            base: [list(self._runs_of(base, name)) for name in self.methods]
            for base in self.base_optimizers
        }
        num_ranks = max(len(ranks) for found in by_rank.values() for ranks in found)
        ordered = [
            replace(run, seed=seed)
            for seed, rank in itertools.product(self.seeds, range(num_ranks))
            for found in by_rank.values()
            for ranks in found
            for run in (ranks[rank] if rank < len(ranks) else [])
        ]
        return list(dict.fromkeys(ordered))

    def _runs_of(self, base: str, name: str) -> Iterator[list[Run]]:
        """Return the runs of a method at each of its learning rates, with the first seed."""
        method, optimizer = self.methods[name], self.base_optimizers[base].instead.get(name)
        if method.bases and base not in method.bases:
            return
        is_alike = optimizer is None and method.lr_decay is None and self.has_gained_baseline
        for lr in method.lrs or (optimizer or self.base_optimizers[base]).lrs:
            found = [Run(base, name, lr, self.seeds[0])]
            if is_alike and method.lookahead_step_size:
                gained = lr / (1.0 - method.lookahead_step_size)
                found.append(Run(base, BASELINE, float(f"{gained:.3g}"), self.seeds[0]))
            yield found

    def optimizer_of(self, run: Run) -> BaseOptimizer:
        """Return the base optimizer of a run."""
        optimizer = self.base_optimizers[run.base]
        return optimizer.instead.get(run.method, optimizer)

    def lr_decay_of(self, run: Run) -> float:
        """Return the fraction of a run in which its learning rate falls."""
        given = (self.methods[run.method].lr_decay, self.optimizer_of(run).lr_decay)
        return next((decay for decay in given if decay is not None), self.lr_decay)

    def as_dict(self) -> dict[str, Any]:
        """Return what decides the results, as plain types."""
        return dataclasses.asdict(dataclasses.replace(self, quick={}))
