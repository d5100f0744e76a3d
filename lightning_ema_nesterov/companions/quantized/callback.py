"""RoSTE as a callback of the Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_ema_nesterov.companions.quantized.choose import Choice, Rotations, as_table
from lightning_ema_nesterov.companions.quantized.convert import rotate_and_quantize
from lightning_ema_nesterov.companions.quantized.layers import RotatedLinear

__all__ = ["RotatedQAT"]


class RotatedQAT(Callback):
    r"""Fine-tune through fake quantizers, with rotations where they lower the rounding error.

    RoSTE: each linear layer is :math:`y = Q_x(x R)\, Q_w(W R)^T + b`. Weights stay in full
    precision and get gradients straight through the quantizers :math:`Q`. Without rounding, a
    rotation :math:`R` cancels; with it, a Hadamard matrix spreads outliers, but also mixes away
    exact zeros. So each rotation is used only where it lowers the error on calibration batches.

    The model is changed in ``setup``, before optimizers and strategy are made, once. Which
    rotations are on and why is told through Lightning's log, and in ``choices``. A checkpoint
    holds the choice, and is loaded into a model that the callback has changed.

    Args:
        calibration_batches: What the module's forward pass takes, a few batches of the training
            data. All processes must get the same.
        weight_bits: As in :func:`rotate_and_quantize`, like all that follow.
        activation_bits: Of each quantized layer's input.
        kv_bits: Of keys and values in LitGPT models.
        rotations: ``"adaptive"``, ``"all"`` or ``"none"``.
        skip: Names or patterns of layers left in full precision.
        unrotated: Names or patterns of places that are never rotated.
        seed: Of the random signs.
        run: Called as ``run(pl_module, batch)``; ``None``: ``pl_module(batch)``.

    Raises:
        ModuleNotFoundError: When a run starts, if torchao is missing.
        RuntimeError: When a run starts, if a layer is not called by the batches.
        ValueError: When a run starts, as :func:`rotate_and_quantize` does.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = RotatedQAT([torch.randn(4, 32)], weight_bits=None, activation_bits=None)
        >>> trainer = Trainer(max_steps=2, callbacks=[callback], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> [(choice.name, choice.is_rotated) for choice in callback.choices]
        [('layer', False)]

    References:
        Wei, Yau, Wai, Zhao, Kang, Park, Hong, *RoSTE: An efficient quantization-aware supervised
        fine-tuning approach for large language models*, ICML 2025.
        https://arxiv.org/abs/2502.09003
    """

    def __init__(
        self,
        calibration_batches: Iterable[Any],
        *,
        weight_bits: int | None = 4,
        activation_bits: int | None = 4,
        kv_bits: int | None = 4,
        rotations: Rotations = "adaptive",
        skip: Sequence[str] = (),
        unrotated: Sequence[str] = (),
        seed: int = 0,
        run: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.choices: list[Choice] = []
        self._calibration_batches = calibration_batches
        self._options: dict[str, Any] = {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "kv_bits": kv_bits,
            "rotations": rotations,
            "skip": skip,
            "unrotated": unrotated,
            "seed": seed,
            "run": run,
        }

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the module, unless it has been in an earlier run."""
        if any(isinstance(module, RotatedLinear) for module in pl_module.modules()):
            return
        self.choices = rotate_and_quantize(pl_module, self._calibration_batches, **self._options)
        rank_zero_info(as_table(self.choices))
