"""How far a run is: steps taken, and the largest learning rate of each parameter group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.checks import warn_on_rank_zero

__all__ = [
    "DECAY_KEY",
    "MAX_LR_KEY",
    "NAMES_KEY",
    "STEP_KEY",
    "Progress",
    "largest_lr",
    "plain_name",
    "set_rate_factor",
]

STEP_KEY = "ema_nesterov_step"
"""Key of the number of steps taken, in the first parameter group of ``optimizer.state_dict()``."""

MAX_LR_KEY = "ema_nesterov_max_lr"
"""Key of the learning-rate reference, in each parameter group of ``optimizer.state_dict()``."""

DECAY_KEY = "ema_nesterov_decay"
"""Key of the decay of the average that directions hold, in the first parameter group."""

NAMES_KEY = "ema_nesterov_names"
"""Key of the names of the parameters, in each group; as lines of one string, since distributed
checkpoints store each element of a list on its own."""

_NO_STEP = -1

_rate_factors: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
_WRAPPERS = {"_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Progress:
    """Steps and learning-rate references of one base optimizer, saved and loaded with it.

    They are in what ``optimizer.state_dict()`` returns. The optimizer's own parameter groups, which
    others compare and copy, hold them after :meth:`leave`, and from a call of ``state_dict()`` to
    the next step: ``set_optimizer_state_dict`` of torch loads a flattened state only where the
    groups have it already.

    Args:
        base_optimizer: The optimizer.
        module: The module that knows the names of the parameters.
        average_decay: Decay of the average that the directions hold, ``None`` if they hold none.

    Attributes:
        is_new: Whether no step was taken, or loaded, with the method.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        module: nn.Module | None = None,
        average_decay: float | None = None,
    ) -> None:
        self.base_optimizer = base_optimizer
        self._module = module
        self._average_decay = average_decay
        self.is_new = True
        self._step_idx = 0
        self._max_lrs: dict[int, float] = {}
        self._is_in_groups = False

    @property
    def step_idx(self) -> int:
        """Steps taken so far."""
        return self._step_idx

    @step_idx.setter
    def step_idx(self, value: int) -> None:
        self._step_idx = value
        self.is_new = False
        self._clear_groups()

    def register(self) -> list[RemovableHandle]:
        """Register hooks for saving and loading; take what :meth:`leave` or a checkpoint left."""
        self._take(self.base_optimizer)
        for idx in range(len(self.base_optimizer.param_groups)):
            self.lr_ratio(idx)
        return [
            self.base_optimizer.register_state_dict_post_hook(self._save),
            self.base_optimizer.register_load_state_dict_post_hook(self._take),
        ]

    def leave(self) -> None:
        """Leave everything in the parameter groups, for checkpoints that are saved later."""
        self._write(self.base_optimizer.param_groups)
        self._is_in_groups = False  # they stay

    def lr_ratio(self, group_idx: int) -> float:
        """Return the learning rate of a parameter group over its maximum, and follow the maximum.

        Returns:
            The ratio, in [0, 1]; 0 while no learning rate was above 0, 1 in a group without ``lr``.
        """
        group = self.base_optimizer.param_groups[group_idx]
        if "lr" not in group:
            return 1.0
        lr = float(group["lr"])  # once: the host waits for a tensor on a GPU
        # A scheduler that was made after attaching tells its peak before the first step.
        is_told = self.is_new and "max_lr" in group
        max_lr = largest_lr(group, lr, None if is_told else self._max_lrs.get(group_idx))
        self._max_lrs[group_idx] = max_lr
        lr *= _rate_factors.get(self.base_optimizer, 1.0)
        return lr / max_lr if max_lr > 0 else 0.0

    def set_max_lr(self, group_idx: int, max_lr: float) -> None:
        """Set the reference of a group whose scheduler does not tell it, unless one was loaded."""
        if self.is_new:
            self._max_lrs[group_idx] = max_lr

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._write(state_dict["param_groups"])
        self._write(optimizer.param_groups)
        self._is_in_groups = True

    def _clear_groups(self) -> None:
        if self._is_in_groups:
            for group in self.base_optimizer.param_groups:
                for key in (STEP_KEY, MAX_LR_KEY, DECAY_KEY, NAMES_KEY):
                    group.pop(key, None)
            self._is_in_groups = False

    def _write(self, groups: Sequence[dict[str, Any]]) -> None:
        groups[0][STEP_KEY] = _NO_STEP if self.is_new else self._step_idx
        for idx, max_lr in self._max_lrs.items():
            groups[idx][MAX_LR_KEY] = max_lr
        if self._average_decay is not None and self._module is not None:
            groups[0][DECAY_KEY] = self._average_decay
            root = self._module
            for name, part in self._module.named_modules():
                # The outermost module, below what Fabric and torch.compile put around it.
                if isinstance(part, DistributedDataParallel) and not plain_name(name):
                    root = part.module
            names = {p: plain_name(name) for name, p in root.named_parameters()}
            for group, own in zip(groups, self.base_optimizer.param_groups, strict=True):
                group[NAMES_KEY] = "\n".join(names.get(p, "") for p in own["params"])

    def _take(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        step_idx = int(groups[0].pop(STEP_KEY, _NO_STEP))
        self.is_new = step_idx == _NO_STEP
        self._step_idx = max(0, step_idx)
        self._check_decay(groups[0].get(DECAY_KEY))
        for group in groups:
            group.pop(DECAY_KEY, None)
            group.pop(NAMES_KEY, None)
        loaded = {idx: group.pop(MAX_LR_KEY, None) for idx, group in enumerate(groups)}
        self._max_lrs = {idx: float(lr) for idx, lr in loaded.items() if lr is not None}

    def _check_decay(self, found: float | None) -> None:
        own = self._average_decay
        if found is not None and own is not None and float(found) != own:
            warn_on_rank_zero(
                f"The run had ema_decay={float(found):g} so far and has {own:g} from here on. It "
                "goes on with the direction that it has. The average of the weights that is read "
                f"from it will be off for the next {10 / (1 - own):,.0f} steps or so."
            )


def largest_lr(group: Mapping[str, Any], lr: float, known: float | None = None) -> float:
    """Return the largest learning rate of a parameter group, as far as anyone has told.

    It starts as ``group["max_lr"]`` where there is one (OneCycleLR sets it, and users may), else as
    the larger of ``initial_lr`` (schedulers set it) and ``lr``. From then on it is the running
    maximum.

    Args:
        group: A parameter group.
        lr: Its learning rate, read by the caller: where it is a tensor on a GPU the host waits.
        known: The maximum so far, ``None`` at the start.

    Example:
        >>> largest_lr({"initial_lr": 0.4}, lr=0.1)
        0.4
    """
    start = group.get("max_lr", group.get("initial_lr", lr)) if known is None else known
    return max(float(start), lr)


def set_rate_factor(optimizer: Optimizer, factor: float) -> None:
    """Tell by what an optimizer's learning rates are multiplied in its next step alone.

    In any order with the lookahead method, or without one.

    Args:
        optimizer: The optimizer; who calls this multiplies them.
        factor: At least 0; 1 until told.
    """
    _rate_factors[optimizer] = factor


def plain_name(name: str) -> str:
    """Return the name of a parameter without what FSDP, Fabric and torch.compile put into it.

    Example:
        >>> plain_name("_forward_module._orig_mod.layer.weight")
        'layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
