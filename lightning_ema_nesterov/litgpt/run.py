"""The run that LitGPT is in: what it does not tell an optimizer, read where it stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from litgpt import pretrain
from litgpt.args import TrainArgs
from torch import nn

__all__ = ["LitGPTRun", "locals_of"]


@dataclass(frozen=True)
class LitGPTRun:
    """A call of ``litgpt.pretrain.main``, which gives an optimizer no more than its parameters.

    Attributes:
        fabric: The Fabric of the run.
        train: The ``train`` block of the YAML.
        micro_batches: Micro-batches of one device in an optimizer step.
        max_seq_length: Tokens in a sequence.
        vocab_size: Rows of the model's embedding.
    """

    fabric: Fabric
    train: TrainArgs
    micro_batches: int
    max_seq_length: int
    vocab_size: int

    @classmethod
    def find(cls) -> LitGPTRun | None:
        """Return the run that is calling, ``None`` outside of LitGPT's pretraining."""
        found = locals_of(pretrain.main)
        if found is None:
            return None
        train = found["train"]
        return cls(
            fabric=found["fabric"],
            train=train,
            micro_batches=train.gradient_accumulation_iters(found["devices"], found["num_nodes"]),
            max_seq_length=found["model"].max_seq_length,
            vocab_size=found["config"].padded_vocab_size,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps that ``train.max_tokens`` allows.

        Raises:
            ValueError: If it allows none.
        """
        tokens_per_micro_batch = self.train.micro_batch_size * self.max_seq_length
        tokens_per_device = int(self.train.max_tokens or 0) // self.fabric.world_size
        steps = int(tokens_per_device // tokens_per_micro_batch // self.micro_batches)
        if not steps:
            raise ValueError(
                f"train.max_tokens must allow one optimizer step of {self.train.global_batch_size} "
                f"sequences of {self.max_seq_length} tokens, got {self.train.max_tokens}."
            )
        return steps

    def check_total_steps(self, total_steps: int | None, *, key: str) -> int:
        """Return the optimizer steps of the run.

        Args:
            total_steps: What the user expects, if anything.
            key: Where in the YAML they say so.

        Raises:
            ValueError: If that is not what ``train.max_tokens`` allows.
        """
        if total_steps not in (None, self.total_steps):
            raise ValueError(
                f"{key} is {total_steps}, and train.max_tokens = "
                f"{self.train.max_tokens} allows {self.total_steps} optimizer steps of "
                f"{self.train.global_batch_size} sequences of {self.max_seq_length} tokens. Remove "
                "total_steps, or make them agree."
            )
        return self.total_steps

    def before_training_forward(
        self, module: nn.Module, action: Callable[[Mapping[str, int]], None]
    ) -> None:
        """Call ``action`` with LitGPT's state before each training forward pass of ``module``.

        The last action that was registered is called first, and before EMA-Nesterov extrapolates if
        that was attached before. The state has ``iter_num``, the number of this micro-batch from 1,
        and ``step_count``, the number of optimizer steps taken.
        """
        state: dict[str, int] = {}

        def before_forward(module: nn.Module, args: Any) -> None:
            nonlocal state
            if module.training and torch.is_grad_enabled():
                state = state or cast(Any, locals_of(pretrain.fit))["state"]
                action(state)

        module.register_forward_pre_hook(before_forward, prepend=True)

    def is_logged(self, state: Mapping[str, int]) -> bool:
        """Whether LitGPT logs training metrics after this micro-batch."""
        return bool(state["iter_num"] % (self.train.log_interval * self.micro_batches) == 0)

    def log_with_training(self, scalars: Callable[[], Mapping[str, float]]) -> None:
        """Add scalars to the training metrics that LitGPT logs, at the same place on the x axis."""
        log_dict = self.fabric.log_dict

        def log_more(metrics: Mapping[str, Any], step: int | None = None) -> None:
            is_training = "learning_rate" in metrics
            log_dict({**metrics, **scalars()} if is_training else metrics, step)

        self.fabric.log_dict = log_more  # type: ignore[method-assign]  # of this object only


def locals_of(function: FunctionType) -> dict[str, Any] | None:
    """Return the variables of the innermost call of a function, ``None`` if none is running."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals
