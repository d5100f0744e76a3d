"""One fit of a decentralized method: the agent, and where it is in its step."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from typing import Any, cast

from torch.optim import Optimizer

from lightning_ema_nesterov.companions.decentralized.agent import Agent, Step
from lightning_ema_nesterov.companions.decentralized.parameters import FlatParameters
from lightning_ema_nesterov.companions.decentralized.replicas import Replica
from lightning_ema_nesterov.companions.decentralized.second_gradient import SecondGradient

__all__ = ["Run"]


class Run:
    """Take an agent through the steps of an optimizer.

    Args:
        optimizer: The only one of the module.
        parameters: Its parameters.
        replica: The process's weights and buffers.
        agent: The process's agent.
        second: Takes the gradient at the agent's previous point, where the method needs one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: FlatParameters,
        replica: Replica,
        agent: Agent,
        second: SecondGradient | None,
    ) -> None:
        self.replica = replica
        self.agent = agent
        self.second = second
        self.detach = ExitStack()
        self.bytes_sent: int | None = None  # by all agents, in a step that is not logged yet
        self._optimizer = optimizer
        self._parameters = parameters
        self._round_idx = 0
        self._lr_reference = 0.0
        self._is_in_step = False
        if second is not None:
            self.detach.callback(second.close)

    def hook(self) -> None:
        """Have the agent finish each step of the optimizer before other hooks see its result."""
        handle = self._optimizer.register_step_post_hook(self._finish_step)
        self.detach.callback(handle.remove)
        # Others' hooks measure the displacement of the step: gossip must be part of it.
        hooks = cast("OrderedDict[int, Any]", self._optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(handle.id, last=False)

    def add_second_gradient(self, share: float) -> None:
        """Add a share of the current batch's gradient at the agent's previous point."""
        if self.second is not None and self.agent.previous_point is not None:
            self.second.add(self.agent.previous_point, share)

    def begin_step(self) -> None:
        """Exchange with the neighbours, at the point where the gradient was taken."""
        if self._is_in_step:  # an optimizer that asks for several gradients in a step
            return
        bytes_sent = self.agent.bytes_of_round(self._round_idx)
        gradient, gradient_step = self._parameters.read_gradients()
        previous = None
        if self.second is not None and self.agent.previous_point is not None:
            previous = self._parameters.scale_gradients(self.second.pop())
        replacement = self.agent.begin(
            Step(
                self._round_idx,
                self._parameters.read(),
                gradient,
                gradient_step,
                previous,
                self._lr_share(),
            )
        )
        if replacement is not None:
            self._parameters.write_gradients(replacement)
        self._is_in_step = True
        self.bytes_sent = bytes_sent

    def cancel(self) -> None:
        """Forget a step that failed, and hold the process's own weights."""
        self._is_in_step = False
        self.replica.move_back()

    def save(self) -> dict[str, Any]:
        """Return what the process needs to go on, besides its optimizer's state."""
        return {
            "replica": self.replica.save(),
            "agent": self.agent.tensors(),
            "round_idx": self._round_idx,
            "lr_reference": self._lr_reference,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what :meth:`save` returned."""
        self.replica.load(saved["replica"])
        self.agent.load(saved["agent"])
        self._round_idx = saved["round_idx"]
        self._lr_reference = saved["lr_reference"]

    def _finish_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_in_step:  # some optimizers call their hooks twice
            self._parameters.write(self.agent.finish(self._parameters.read()))
            self._is_in_step = False
            self._round_idx += 1

    def _lr_share(self) -> float:
        group = self._optimizer.param_groups[0]
        lr = float(group["lr"])
        peak = float(group.get("max_lr") or group.get("initial_lr") or lr)
        self._lr_reference = max(self._lr_reference, peak, lr)
        return lr / self._lr_reference if self._lr_reference else 0.0
