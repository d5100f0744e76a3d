"""Which parameters look ahead how far: parameter groups may have a step size of their own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.checks import check_step_size
from lightning_ema_nesterov.core.progress import Progress
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule

__all__ = ["Scope"]


class Scope:
    """The peak step size of each parameter group of one base optimizer.

    Where a group has the rule's ``step_size_key``, its value takes the place of the schedule's
    peak. In a group at 0 nothing looks ahead; its directions are kept, and with them the average.

    Args:
        rule: Says which key of a group counts, if any.
    """

    def __init__(self, rule: LookaheadRule) -> None:
        self._rule = rule
        self._key = rule.step_size_key or ""  # no group has this one
        self._before_load: list[dict[str, Any]] = []

    def peaks(self, schedule: LookaheadSchedule) -> list[float]:
        """Return the peak step size of each parameter group.

        Raises:
            ValueError: If that of a group is not in (-1, 1).
        """
        found = []
        for idx, group in enumerate(self._rule.base_optimizer.param_groups):
            peak = group.get(self._key, schedule.lookahead_step_size)
            if self._key in group:
                role = f" (role {group['role']!r})" if "role" in group else ""
                check_step_size(f"{self._key} of parameter group {idx}{role}", peak)
            found.append(float(peak))
        return found

    def is_ever_ahead(self, schedule: LookaheadSchedule) -> bool:
        """Return whether any parameter looks ahead in any step."""
        return schedule.has_active_steps and any(self.peaks(schedule))

    def by_step_size(
        self, schedule: LookaheadSchedule, progress: Progress
    ) -> list[tuple[float, list[Tensor]]]:
        """Return the current step sizes, and the parameters that move with each."""
        found: dict[float, list[Tensor]] = defaultdict(list)
        groups = self._rule.base_optimizer.param_groups
        for idx, (group, peak) in enumerate(zip(groups, self.peaks(schedule), strict=True)):
            lr_ratio = progress.lr_ratio(idx)
            step_size = schedule.step_size(progress.step_idx, lr_ratio, peak=peak)
            found[step_size] += [
                p for p in group["params"] if p.requires_grad and self._rule.store.has(p)
            ]
        return list(found.items())

    def keep_on_load(self) -> list[RemovableHandle]:
        """Register hooks: torch drops a key of a group that a checkpoint lacks.

        One that the checkpoint has is loaded, like a learning rate.
        """
        optimizer, key = self._rule.base_optimizer, self._key

        def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            self._before_load = [dict(group) for group in optimizer.param_groups]

        def after_load(optimizer: Optimizer) -> None:
            for group, before in zip(optimizer.param_groups, self._before_load, strict=True):
                if key in before:
                    group.setdefault(key, before[key])
            self._before_load = []

        return [
            optimizer.register_load_state_dict_pre_hook(before_load),
            optimizer.register_load_state_dict_post_hook(after_load),
        ]
