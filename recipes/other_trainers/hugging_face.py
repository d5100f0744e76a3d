"""EMA-Nesterov in the Trainer of Hugging Face's transformers: a class, and a callback."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers

from lightning_ema_nesterov import EMANesterovHandle, attach_ema_nesterov


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` with EMA-Nesterov, whose scalars are in the Trainer's logs."""

    ema_nesterov_args: ClassVar[dict[str, Any]] = {"lookahead_step_size": 0.5, "ema_decay": 0.99}
    handle: EMANesterovHandle | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Attach: the model and the optimizer are prepared now, and a checkpoint is loaded next."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.handle is not None:  # of a former call of train()
            self.handle.detach()
        self.handle = attach_ema_nesterov(
            self.optimizer, self.model, total_steps=num_training_steps, **self.ema_nesterov_args
        )
        return scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Have the step measured if it will be logged."""
        if (self.state.global_step + 1) % self.state.logging_steps == 0:
            self.handle.measure_next_step()
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what was measured beside the training loss."""
        if "loss" in logs and self.handle.metrics is not None:
            logs = {**logs, **self.handle.metrics.as_scalars("")}
        super().log(logs, *args, **kwargs)


class EMANesterovCallback(transformers.TrainerCallback):
    """Likewise for any ``transformers.Trainer``, where the weights are in float32."""

    def __init__(self, **ema_nesterov_args: Any) -> None:
        self.ema_nesterov_args = ema_nesterov_args
        self.handle: EMANesterovHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to what was prepared, and loaded."""
        self.on_train_end(args, state, control)  # of a former call of train() that raised
        self.handle = attach_ema_nesterov(
            kwargs["optimizer"],
            kwargs["model"],
            total_steps=state.max_steps,
            **self.ema_nesterov_args,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, with the parameters at the iterate."""
        if self.handle is not None:
            self.handle.detach()
            self.handle = None
